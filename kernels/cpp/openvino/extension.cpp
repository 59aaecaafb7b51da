// bitsmith::WinogradConv as an operation of OpenVINO: NHWC 8-bit levels in and out, on OpenVINO's own threads.
#include <cstdint>
#include <cstdio>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include <openvino/core/extension.hpp>
#include <openvino/core/op_extension.hpp>
#include <openvino/frontend/extension.hpp>
#include <openvino/frontend/onnx/extension/op.hpp>
#include <openvino/op/constant.hpp>
#include <openvino/op/op.hpp>

#include "binary_operations.h"
#include "check.h"
#include "isa.h"
#include "layer.h"
#include "threads.h"

namespace {

enum Input : std::size_t { image, weights, multipliers, offsets, scales, bias, residual };

struct Attributes {
    std::int64_t tile = 2, bits = 8, x_zero = 0, y_zero = 0, y_signed = 0, low = 0, high = 255, residual_zero = 0;
    std::vector<std::int64_t> pads = {1, 1, 1, 1};
    float y_scale = 1, residual_scale = 1;
};

// Packed when the operation first runs; copies of the operation share it.
struct Shared {
    std::once_flag once;
    std::unique_ptr<bitsmith::Layer> layer;
    bool checked = false;  // what is constant; models are read and compiled on one thread
};

// The constant inputs in the types of a Spec, which points into them.
struct Arrays {
    std::vector<std::int16_t> mul, offset, wide;
};

bool is_level(const ov::element::Type& type) { return type == ov::element::u8 || type == ov::element::i8; }

// The plugin turns constants of 16 bits into 32.
bool is_word(const ov::element::Type& type) { return type == ov::element::i16 || type == ov::element::i32; }

std::vector<std::int16_t> words(const ov::Tensor& tensor) {
    if (tensor.get_element_type() == ov::element::i16) {
        const auto* first = static_cast<const std::int16_t*>(tensor.data());
        return {first, first + tensor.get_size()};
    }
    const auto* first = static_cast<const std::int32_t*>(tensor.data());
    return {first, first + tensor.get_size()};
}

}  // namespace

namespace bitsmith {

// Inputs: x [N, H, W, C] u8 or i8; u [P, K, C] i8 or i16; mul [P, C] i16; offset [C] i16; us [P, K] f32; bias [K] f32;
// residual [N, H', W', K] or none. Output [N, H', W', K] u8, or i8 if y_signed. Everything but x and the residual is constant.
class WinogradConv : public ov::op::Op {
public:
    OPENVINO_OP("WinogradConv", "bitsmith");

    WinogradConv() = default;
    WinogradConv(const ov::OutputVector& inputs, const WinogradConv& like) : Op(inputs), own_(like.own_), shared_(like.shared_) {
        constructor_validate_and_infer_types();
    }

    void validate_and_infer_types() override {
        const auto type = [&](Input i) { return get_input_element_type(i); };
        const std::size_t count = get_input_size();
        NODE_VALIDATION_CHECK(this, count == 6 || count == 7, "takes 6 inputs, or 7 with a residual");
        NODE_VALIDATION_CHECK(this, is_level(type(image)), "x must be u8 or i8, in NHWC");
        NODE_VALIDATION_CHECK(this, own_.bits == 8 ? type(weights) == ov::element::i8 : is_word(type(weights)),
                              "u must be i8 for 8 bits and i16 for 16");
        NODE_VALIDATION_CHECK(this, is_word(type(multipliers)) && is_word(type(offsets)),
                              "mul and offset must be i16");
        NODE_VALIDATION_CHECK(this, type(scales) == ov::element::f32 && type(bias) == ov::element::f32,
                              "us and bias must be f32");
        NODE_VALIDATION_CHECK(this, count == 6 || is_level(type(residual)), "the residual must be u8 or i8, in NHWC");
        NODE_VALIDATION_CHECK(this, own_.pads.size() == 4, "pads must be top, left, bottom, right");
        const ov::PartialShape& x = get_input_partial_shape(image);
        const ov::PartialShape& u = get_input_partial_shape(weights);
        NODE_VALIDATION_CHECK(this, x.rank().compatible(4) && u.rank().compatible(3), "x must be NHWC and u [P, K, C]");
        ov::PartialShape y = ov::PartialShape::dynamic(4);
        if (x.rank().is_static() && u.rank().is_static()) {
            NODE_VALIDATION_CHECK(this, x[3].compatible(u[2]), "x and u have different input channels");
            y = {x[0], x[1] + own_.pads[0] + own_.pads[2] - 2, x[2] + own_.pads[1] + own_.pads[3] - 2, u[1]};
            for (const std::size_t side : {1, 2})
                NODE_VALIDATION_CHECK(this, y[side].is_dynamic() || y[side].get_length() >= 1, "x is ", x,
                                      ": the padded map is smaller than the 3 x 3 kernel");
        }
        NODE_VALIDATION_CHECK(this, count == 6 || get_input_partial_shape(residual).compatible(y),
                              "the residual must have the shape of the output");
        if (x.rank().is_static() && u.rank().is_static()) check_values(x, u);
        set_output_type(0, own_.y_signed ? ov::element::i8 : ov::element::u8, y);
    }

    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
        return std::make_shared<WinogradConv>(inputs, *this);
    }

    bool visit_attributes(ov::AttributeVisitor& visitor) override {
        visitor.on_attribute("tile", own_.tile);
        visitor.on_attribute("bits", own_.bits);
        visitor.on_attribute("pads", own_.pads);
        visitor.on_attribute("x_zero", own_.x_zero);
        visitor.on_attribute("y_scale", own_.y_scale);
        visitor.on_attribute("y_zero", own_.y_zero);
        visitor.on_attribute("y_signed", own_.y_signed);
        visitor.on_attribute("low", own_.low);
        visitor.on_attribute("high", own_.high);
        visitor.on_attribute("residual_scale", own_.residual_scale);
        visitor.on_attribute("residual_zero", own_.residual_zero);
        return true;
    }

    bool has_evaluate() const override { return true; }

    // OpenVINO 2026.4 says nothing of what is thrown here, nor of false, and leaves the output as it was: what can be
    // known before is refused in check_values, and the rest at least printed.
    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override try {
        std::call_once(shared_->once, [&] {
            Arrays arrays;
            shared_->layer = std::make_unique<Layer>(spec_of(inputs, arrays));
        });
        Call call = call_of(inputs[image].get_shape());
        call.x = inputs[image].data();
        call.y = outputs[0].data();
        if (inputs.size() > residual) call.residual = inputs[residual].data();
        call.parts = its_threads();
        shared_->layer->run(call, on_its_threads);
        return true;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "bitsmith::WinogradConv %s: %s\n", get_friendly_name().c_str(), error.what());
        return false;
    }

private:
    // What a layer or a run would refuse is refused when the model is read. Nothing is computed with sizes that differ.
    void check_values(const ov::PartialShape& x, const ov::PartialShape& u) {
        NODE_VALIDATION_CHECK(this, own_.tile == 2 || own_.tile == 4, "tile is ", own_.tile, "; must be 2 or 4");
        NODE_VALIDATION_CHECK(this, own_.bits == 8 || own_.bits == 16, "bits is ", own_.bits, "; must be 8 or 16");
        for (const std::int64_t value : {own_.x_zero, own_.y_zero, own_.low, own_.high, own_.residual_zero})
            NODE_VALIDATION_CHECK(this, value >= -128 && value <= 255, "a level is ", value, "; must be in -128 .. 255");
        const std::int64_t taps = (own_.tile + 2) * (own_.tile + 2);
        const auto has = [&](Input i, const ov::PartialShape& shape) {
            NODE_VALIDATION_CHECK(this, get_input_partial_shape(i).compatible(shape), "input ", static_cast<int>(i),
                                  " is ", get_input_partial_shape(i), "; must be ", shape);
        };
        has(weights, {taps, u[1], u[2]});
        has(multipliers, {taps, u[2]});
        has(offsets, {u[2]});
        has(scales, {taps, u[1]});
        has(bias, {u[1]});
        ov::TensorVector inputs(1);
        for (const Input i : {weights, multipliers, offsets, scales, bias}) {
            const auto constant = ov::as_type_ptr<ov::op::v0::Constant>(get_input_node_shared_ptr(i));
            if (!constant || shared_->checked) return;
            inputs.push_back(constant->get_tensor_view());
        }
        try {
            Arrays arrays;
            check(spec_of(inputs, arrays));
            const bool sized = x.is_static();
            Call call = call_of(sized ? x.to_shape() : ov::Shape{0, 3, 3, 1});
            call.batch = 0;  // no images yet
            if (get_input_size() > residual) call.residual = &call;  // its levels are to be checked; it is not read
            const std::ptrdiff_t pads[] = {own_.pads[0] + own_.pads[2] - 2, own_.pads[1] + own_.pads[3] - 2};
            check(call, call.height + pads[0], call.width + pads[1]);
        } catch (const std::invalid_argument& error) {
            NODE_VALIDATION_CHECK(this, false, error.what());
        }
        shared_->checked = true;
    }

    // `inputs` holds at least those from the weights to the bias.
    Spec spec_of(const ov::TensorVector& inputs, Arrays& arrays) const {
        const ov::Shape& u = inputs[weights].get_shape();
        arrays.mul = words(inputs[multipliers]);
        arrays.offset = words(inputs[offsets]);
        if (own_.bits != 8) arrays.wide = words(inputs[weights]);
        Spec spec;
        spec.tile = static_cast<int>(own_.tile);
        spec.bits = static_cast<int>(own_.bits);
        spec.channels_in = static_cast<std::ptrdiff_t>(u[2]);
        spec.channels_out = static_cast<std::ptrdiff_t>(u[1]);
        spec.u = own_.bits == 8 ? inputs[weights].data() : arrays.wide.data();
        spec.mul = arrays.mul.data();
        spec.offset = arrays.offset.data();
        spec.us = inputs[scales].data<const float>();
        spec.bias = inputs[bias].data<const float>();
        spec.x_zero = static_cast<int>(own_.x_zero);
        spec.x_signed = get_input_element_type(image) == ov::element::i8;
        spec.pad_top = static_cast<int>(own_.pads[0]);
        spec.pad_left = static_cast<int>(own_.pads[1]);
        spec.pad_bottom = static_cast<int>(own_.pads[2]);
        spec.pad_right = static_cast<int>(own_.pads[3]);
        spec.isa = available_isas().front();
        return spec;
    }

    // All but the arrays.
    Call call_of(const ov::Shape& x) const {
        Call call;
        call.batch = static_cast<std::ptrdiff_t>(x[0]);
        call.height = static_cast<std::ptrdiff_t>(x[1]);
        call.width = static_cast<std::ptrdiff_t>(x[2]);
        call.y_levels = {own_.y_scale, static_cast<int>(own_.y_zero), own_.y_signed != 0};
        call.low = static_cast<int>(own_.low);
        call.high = static_cast<int>(own_.high);
        if (get_input_size() > residual)
            call.residual_levels = {own_.residual_scale, static_cast<int>(own_.residual_zero),
                                    get_input_element_type(residual) == ov::element::i8};
        return call;
    }

    Attributes own_;
    std::shared_ptr<Shared> shared_ = std::make_shared<Shared>();
};

}  // namespace bitsmith

namespace {

std::vector<ov::Extension::Ptr> extensions() {
    std::vector<ov::Extension::Ptr> all = bitsmith::binary_extensions();
    all.push_back(std::make_shared<ov::OpExtension<bitsmith::WinogradConv>>());
    all.push_back(std::make_shared<ov::frontend::onnx::OpExtension<bitsmith::WinogradConv>>("WinogradConv", "bitsmith"));
    return all;
}

}  // namespace

OPENVINO_CREATE_EXTENSIONS(extensions());
