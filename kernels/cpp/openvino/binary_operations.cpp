#include "binary_operations.h"

#include <cstdio>
#include <memory>
#include <mutex>
#include <stdexcept>

#include <openvino/core/op_extension.hpp>
#include <openvino/frontend/extension.hpp>
#include <openvino/frontend/onnx/extension/op.hpp>
#include <openvino/op/op.hpp>

#include "binary_layer.h"
#include "threads.h"

namespace {

enum Input : std::size_t { values, bits, scales, shifts };

// Packed when the operation first runs; copies of the operation share it.
template <class Layer>
struct Shared {
    std::once_flag once;
    std::unique_ptr<Layer> layer;
};

void check_inputs(const ov::Node* node) {
    NODE_VALIDATION_CHECK(node, node->get_input_size() == 4, "takes 4 inputs");
    for (const Input i : {values, scales, shifts})
        NODE_VALIDATION_CHECK(node, node->get_input_element_type(i) == ov::element::f32, "input ", static_cast<int>(i),
                              " must be f32");
    NODE_VALIDATION_CHECK(node, node->get_input_element_type(bits) == ov::element::u8, "bits must be u8");
}

// OpenVINO 2026.4 says nothing of what is thrown while a network runs, nor of false: what can be known before is refused
// when a file is read.
void check_spec(const ov::Node* node, const bitsmith::BinarySpec& spec, const ov::PartialShape& wanted) {
    NODE_VALIDATION_CHECK(node, node->get_input_partial_shape(bits).compatible(wanted), "bits are ",
                          node->get_input_partial_shape(bits), "; must be ", wanted);
    for (const Input i : {scales, shifts})
        NODE_VALIDATION_CHECK(node, node->get_input_partial_shape(i).compatible({spec.channels_out}), "input ",
                              static_cast<int>(i), " is ", node->get_input_partial_shape(i), "; must be [",
                              spec.channels_out, "]");
    try {
        bitsmith::check(spec);
    } catch (const std::invalid_argument& error) {
        NODE_VALIDATION_CHECK(node, false, error.what());
    }
}

bitsmith::BinarySpec with_arrays(bitsmith::BinarySpec spec, const ov::TensorVector& inputs) {
    spec.bits = inputs[bits].data<const std::uint8_t>();
    spec.scale = inputs[scales].data<const float>();
    spec.shift = inputs[shifts].data<const float>();
    spec.isa = bitsmith::best_binary_isa();
    return spec;
}

template <class Layer, class Run>
bool evaluated(const ov::Node& node, Shared<Layer>& shared, const bitsmith::BinarySpec& spec,
               const ov::TensorVector& inputs, Run&& run) try {
    std::call_once(shared.once, [&] { shared.layer = std::make_unique<Layer>(with_arrays(spec, inputs)); });
    run(*shared.layer);
    return true;
} catch (const std::exception& error) {
    std::fprintf(stderr, "bitsmith::%s %s: %s\n", node.get_type_name(), node.get_friendly_name().c_str(), error.what());
    return false;
}

}  // namespace

namespace bitsmith {

// Inputs: x f32 [N, C, H, W]; bits u8 [K, taps, ceil(C / 8)]; scale, shift f32 [K]. Output f32 [N, K, H', W']. Everything
// but x is constant.
class BinaryConvolution : public ov::op::Op {
public:
    OPENVINO_OP("BinaryConv", "bitsmith");

    BinaryConvolution() = default;
    BinaryConvolution(const ov::OutputVector& inputs, const BinaryConvolution& like)
        : Op(inputs), channels_(like.channels_), kernel_(like.kernel_), strides_(like.strides_),
          dilations_(like.dilations_), pads_(like.pads_), shared_(like.shared_) {
        constructor_validate_and_infer_types();
    }

    void validate_and_infer_types() override {
        check_inputs(this);
        const ov::PartialShape &x = get_input_partial_shape(values), &given = get_input_partial_shape(bits);
        NODE_VALIDATION_CHECK(this, x.rank().compatible(4) && given.is_static() && given.size() == 3,
                              "x must be NCHW and bits [K, taps, bytes]");
        NODE_VALIDATION_CHECK(this, kernel_.size() == 2 && strides_.size() == 2 && dilations_.size() == 2 && pads_.size() == 4,
                              "kernel, strides and dilations are by height and width, pads top, left, bottom, right");
        const BinarySpec spec = this->spec();
        check_spec(this, spec, {given[0], spec.kernel[0] * spec.kernel[1], (channels_ + 7) / 8});
        ov::PartialShape y = ov::PartialShape::dynamic(4);
        y[1] = given[0];
        if (x.rank().is_static()) {
            NODE_VALIDATION_CHECK(this, x[1].compatible(channels_), "x has ", x[1], " channels, the bits are of ", channels_);
            y[0] = x[0];
            for (const int axis : {0, 1}) {
                const ov::Dimension& side = x[static_cast<std::size_t>(axis) + 2];
                if (side.is_dynamic()) continue;
                const auto at = static_cast<std::size_t>(axis);
                const std::int64_t left = side.get_length() + pads_[at] + pads_[at + 2] - (kernel_[at] - 1) * dilations_[at] - 1;
                NODE_VALIDATION_CHECK(this, left >= 0, "x is ", x, ": the padded map is smaller than the kernel");
                y[at + 2] = left / strides_[at] + 1;
            }
        }
        set_output_type(0, ov::element::f32, y);
    }

    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
        return std::make_shared<BinaryConvolution>(inputs, *this);
    }

    bool visit_attributes(ov::AttributeVisitor& visitor) override {
        visitor.on_attribute("channels", channels_);
        visitor.on_attribute("kernel", kernel_);
        visitor.on_attribute("strides", strides_);
        visitor.on_attribute("dilations", dilations_);
        visitor.on_attribute("pads", pads_);
        return true;
    }

    bool has_evaluate() const override { return true; }

    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
        return evaluated(*this, *shared_, spec(), inputs, [&](const BinaryConv& layer) {
            const ov::Shape& x = inputs[values].get_shape();
            layer.run(inputs[values].data<const float>(), static_cast<std::ptrdiff_t>(x[0]), static_cast<std::ptrdiff_t>(x[2]),
                      static_cast<std::ptrdiff_t>(x[3]), outputs[0].data<float>(), its_threads(), on_its_threads);
        });
    }

private:
    // All but the arrays.
    BinarySpec spec() const {
        BinarySpec spec;
        spec.channels_in = channels_;
        spec.channels_out = static_cast<std::ptrdiff_t>(get_input_partial_shape(bits)[0].get_length());
        for (std::size_t axis = 0; axis < 2; ++axis) {
            spec.kernel[axis] = kernel_[axis];
            spec.strides[axis] = strides_[axis];
            spec.dilations[axis] = dilations_[axis];
        }
        for (std::size_t side = 0; side < 4; ++side) spec.pads[side] = pads_[side];
        return spec;
    }

    std::int64_t channels_ = 0;
    std::vector<std::int64_t> kernel_ = {1, 1}, strides_ = {1, 1}, dilations_ = {1, 1}, pads_ = {0, 0, 0, 0};
    std::shared_ptr<Shared<BinaryConv>> shared_ = std::make_shared<Shared<BinaryConv>>();
};

// Inputs: x f32 [..., C]; bits u8 [K, ceil(C / 8)]; scale, shift f32 [K]. Output f32 [..., K].
class BinaryLinear : public ov::op::Op {
public:
    OPENVINO_OP("BinaryLinear", "bitsmith");

    BinaryLinear() = default;
    BinaryLinear(const ov::OutputVector& inputs, const BinaryLinear& like)
        : Op(inputs), channels_(like.channels_), shared_(like.shared_) {
        constructor_validate_and_infer_types();
    }

    void validate_and_infer_types() override {
        check_inputs(this);
        const ov::PartialShape &x = get_input_partial_shape(values), &given = get_input_partial_shape(bits);
        NODE_VALIDATION_CHECK(this, x.rank().is_static() && x.size() >= 1 && given.is_static() && given.size() == 2,
                              "x must be [..., C] and bits [K, bytes]");
        NODE_VALIDATION_CHECK(this, x[x.size() - 1].compatible(channels_), "x has ", x[x.size() - 1],
                              " channels, the bits are of ", channels_);
        check_spec(this, spec(), {given[0], (channels_ + 7) / 8});
        ov::PartialShape y = x;
        y[y.size() - 1] = given[0];
        set_output_type(0, ov::element::f32, y);
    }

    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
        return std::make_shared<BinaryLinear>(inputs, *this);
    }

    bool visit_attributes(ov::AttributeVisitor& visitor) override {
        visitor.on_attribute("channels", channels_);
        return true;
    }

    bool has_evaluate() const override { return true; }

    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
        return evaluated(*this, *shared_, spec(), inputs, [&](const BinaryDense& layer) {
            const std::size_t rows = inputs[values].get_size() / static_cast<std::size_t>(channels_);
            layer.run(inputs[values].data<const float>(), static_cast<std::ptrdiff_t>(rows), outputs[0].data<float>(),
                      its_threads(), on_its_threads);
        });
    }

private:
    BinarySpec spec() const {
        BinarySpec spec;
        spec.channels_in = channels_;
        spec.channels_out = static_cast<std::ptrdiff_t>(get_input_partial_shape(bits)[0].get_length());
        return spec;
    }

    std::int64_t channels_ = 0;
    std::shared_ptr<Shared<BinaryDense>> shared_ = std::make_shared<Shared<BinaryDense>>();
};

std::vector<ov::Extension::Ptr> binary_extensions() {
    return {std::make_shared<ov::OpExtension<BinaryConvolution>>(),
            std::make_shared<ov::frontend::onnx::OpExtension<BinaryConvolution>>("BinaryConv", "bitsmith"),
            std::make_shared<ov::OpExtension<BinaryLinear>>(),
            std::make_shared<ov::frontend::onnx::OpExtension<BinaryLinear>>("BinaryLinear", "bitsmith")};
}

}  // namespace bitsmith
