// Routes with AVX-512 F, BW, DQ, VL.
#include "gemm/float_dots.h"
#include "gemm/float_panels.h"
#include "gemm/float_row_sums.h"
#include "gemm/floats_avx512.h"
#include "gemm/register_dots_avx512.h"

namespace lora_ops {

const GemmRoute kAvx512RegisterDots = {serves_register_dots, plan_register_dots, prepare_register_dots,
                                       register_dots_task};
const GemmRoute kAvx512Dots = float_dots<Avx512Floats>();
const GemmRoute kAvx512RowSums = float_row_sums<Avx512Floats>();
const GemmRoute kAvx512Panels = float_panels<Avx512Floats>();

}  // namespace lora_ops
