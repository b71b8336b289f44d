// Int8 matmul's entry points of the Python module `kernels._cpu`.
//
// Tensors arrive checked from kernels/int8_matmul/cpu.py and rows/cpu.py; None stands for an absent
// one.
#include "common/cpu/isa.h"
#include "common/cpu/python.h"

namespace kernels::int8_matmul {
namespace {

Scales scales(const View& x) { return {static_cast<const float*>(x.data), x.size[0] > 1}; }

// x [rows, depth], weight [cols, depth], y [rows, cols]; scales float32 [1] or one for each row.
void int8_matmul_forward(View x, View weight, View x_scale, View weight_scale, View bias,
                         int64_t activation, int64_t mode, View y) {
  const MatmulCall call = {.mode = Mode(mode),
                           .activation = Activation(activation),
                           .rows = x.size[0],
                           .cols = weight.size[0],
                           .depth = x.size[1],
                           .x = x.data,
                           .x_dtype = DType(x.dtype),
                           .x_row = x.stride[0],
                           .weight = static_cast<const int8_t*>(weight.data),
                           .weight_row = weight.stride[0],
                           .weight_column = weight.stride[1],
                           .x_scale = scales(x_scale),
                           .weight_scale = scales(weight_scale),
                           .bias = bias.data,
                           .bias_dtype = DType(bias.dtype),
                           .y = y.data,
                           .y_dtype = DType(y.dtype)};
  const WithoutGil others_run;
  current_instruction_set()->int8_matmul->matmul(call);
}

// x and values [rows, cols], scale float32 [rows]; weight and bias are the layer norm's.
void int8_rows_forward(View x, int64_t normalized, Tensor weight, Tensor bias, double eps,
                       Memory values, Memory scale) {
  const RowsCall call = {.rows = x.size[0],
                         .cols = x.size[1],
                         .x = x.data,
                         .dtype = DType(x.dtype),
                         .x_row = x.stride[0],
                         .normalized = normalized != 0,
                         .weight = {weight.data, weight.dtype},
                         .bias = {bias.data, bias.dtype},
                         .eps = float(eps),
                         .values = static_cast<int8_t*>(values.data),
                         .scale = static_cast<float*>(scale.data)};
  const WithoutGil others_run;
  current_instruction_set()->int8_matmul->rows(call);
}

}  // namespace

PyMethodDef entry_points[] = {ENTRY_POINT(int8_matmul_forward),
                              ENTRY_POINT(int8_rows_forward),
                              {nullptr, nullptr, 0, nullptr}};

}  // namespace kernels::int8_matmul
