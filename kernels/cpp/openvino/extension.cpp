// bitsmith::WinogradConv as an operation of OpenVINO: NHWC 8-bit levels in and out, on OpenVINO's own threads.
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include <openvino/core/extension.hpp>
#include <openvino/core/op_extension.hpp>
#include <openvino/frontend/extension.hpp>
#include <openvino/frontend/onnx/extension/op.hpp>
#include <openvino/op/op.hpp>
#include <tbb/parallel_for.h>
#include <tbb/task_arena.h>

#include "isa.h"
#include "layer.h"

namespace {

enum Input : std::size_t { image, weights, multipliers, scales, bias, residual };

struct Attributes {
    std::int64_t tile = 2, bits = 8, x_zero = 0, y_zero = 0, y_signed = 0, low = 0, high = 255, residual_zero = 0;
    std::vector<std::int64_t> pads = {1, 1, 1, 1};
    float y_scale = 1, residual_scale = 1;
};

// Packed when the operation first runs; copies of the operation share it.
struct Shared {
    std::once_flag once;
    std::unique_ptr<bitsmith::Layer> layer;
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

// evaluate() runs inside OpenVINO's arena, so these are the threads that the user gave to it.
void on_its_threads(int n, const std::function<void(int)>& f) {
    tbb::parallel_for(0, n, [&](int i) { f(i); }, tbb::static_partitioner());
}

}  // namespace

namespace bitsmith {

// Inputs: x [N, H, W, C] u8 or i8; u [P, K, C] i8 or i16; mul [P] i16; us [P, K] f32; bias [K] f32; residual
// [N, H', W', K] or none. Output [N, H', W', K] u8, or i8 if y_signed. Everything but x and the residual is constant.
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
        NODE_VALIDATION_CHECK(this, count == 5 || count == 6, "takes 5 inputs, or 6 with a residual");
        NODE_VALIDATION_CHECK(this, is_level(type(image)), "x must be u8 or i8, in NHWC");
        NODE_VALIDATION_CHECK(this, own_.bits == 8 ? type(weights) == ov::element::i8 : is_word(type(weights)),
                              "u must be i8 for 8 bits and i16 for 16");
        NODE_VALIDATION_CHECK(this, is_word(type(multipliers)), "mul must be i16");
        NODE_VALIDATION_CHECK(this, type(scales) == ov::element::f32 && type(bias) == ov::element::f32,
                              "us and bias must be f32");
        NODE_VALIDATION_CHECK(this, count == 5 || is_level(type(residual)), "the residual must be u8 or i8, in NHWC");
        NODE_VALIDATION_CHECK(this, own_.pads.size() == 4, "pads must be top, left, bottom, right");
        const ov::PartialShape& x = get_input_partial_shape(image);
        const ov::PartialShape& u = get_input_partial_shape(weights);
        NODE_VALIDATION_CHECK(this, x.rank().compatible(4) && u.rank().compatible(3), "x must be NHWC and u [P, K, C]");
        ov::PartialShape y = ov::PartialShape::dynamic(4);
        if (x.rank().is_static() && u.rank().is_static()) {
            NODE_VALIDATION_CHECK(this, x[3].compatible(u[2]), "x and u have different input channels");
            y = {x[0], x[1] + own_.pads[0] + own_.pads[2] - 2, x[2] + own_.pads[1] + own_.pads[3] - 2, u[1]};
        }
        NODE_VALIDATION_CHECK(this, count == 5 || get_input_partial_shape(residual).compatible(y),
                              "the residual must have the shape of the output");
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

    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
        std::call_once(shared_->once, [&] { shared_->layer = packed(inputs); });
        const ov::Shape& shape = inputs[image].get_shape();
        Call call;
        call.x = inputs[image].data();
        call.batch = static_cast<std::ptrdiff_t>(shape[0]);
        call.height = static_cast<std::ptrdiff_t>(shape[1]);
        call.width = static_cast<std::ptrdiff_t>(shape[2]);
        call.y = outputs[0].data();
        call.y_levels = {own_.y_scale, static_cast<int>(own_.y_zero), own_.y_signed != 0};
        call.low = static_cast<int>(own_.low);
        call.high = static_cast<int>(own_.high);
        if (inputs.size() > residual) {
            call.residual = inputs[residual].data();
            const bool is_signed = inputs[residual].get_element_type() == ov::element::i8;
            call.residual_levels = {own_.residual_scale, static_cast<int>(own_.residual_zero), is_signed};
        }
        call.parts = tbb::this_task_arena::max_concurrency();
        shared_->layer->run(call, on_its_threads);
        return true;
    }

private:
    std::unique_ptr<Layer> packed(const ov::TensorVector& inputs) const {
        const ov::Shape& u = inputs[weights].get_shape();
        Spec spec;
        spec.tile = static_cast<int>(own_.tile);
        spec.bits = static_cast<int>(own_.bits);
        spec.channels_in = static_cast<std::ptrdiff_t>(u[2]);
        spec.channels_out = static_cast<std::ptrdiff_t>(u[1]);
        const std::vector<std::int16_t> mul = words(inputs[multipliers]);
        const std::vector<std::int16_t> wide = own_.bits == 8 ? std::vector<std::int16_t>() : words(inputs[weights]);
        spec.u = own_.bits == 8 ? inputs[weights].data() : wide.data();
        spec.mul = mul.data();
        spec.us = inputs[scales].data<const float>();
        spec.bias = inputs[bias].data<const float>();
        spec.x_zero = static_cast<int>(own_.x_zero);
        spec.x_signed = inputs[image].get_element_type() == ov::element::i8;
        spec.pad_top = static_cast<int>(own_.pads[0]);
        spec.pad_left = static_cast<int>(own_.pads[1]);
        spec.pad_bottom = static_cast<int>(own_.pads[2]);
        spec.pad_right = static_cast<int>(own_.pads[3]);
        spec.isa = available_isas().front();
        return std::make_unique<Layer>(spec);
    }

    Attributes own_;
    std::shared_ptr<Shared> shared_ = std::make_shared<Shared>();
};

}  // namespace bitsmith

OPENVINO_CREATE_EXTENSIONS(std::vector<ov::Extension::Ptr>(
    {std::make_shared<ov::OpExtension<bitsmith::WinogradConv>>(),
     std::make_shared<ov::frontend::onnx::OpExtension<bitsmith::WinogradConv>>("WinogradConv", "bitsmith")}));
