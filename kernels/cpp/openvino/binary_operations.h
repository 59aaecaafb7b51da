// bitsmith::BinaryConv and bitsmith::BinaryLinear as operations of OpenVINO: floats in and out, on OpenVINO's own threads.
#pragma once

#include <openvino/core/extension.hpp>

#include <vector>

namespace bitsmith {

std::vector<ov::Extension::Ptr> binary_extensions();

}  // namespace bitsmith
