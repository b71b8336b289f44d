// ldmatrix and stmatrix: 8×8 matrices of 16-bit elements between shared memory and a warp.
//
// Lane 8 q + r gives the address of row r of matrix q. Lane l holds the elements (l / 4, 2 (l % 4))
// and its right neighbour of each matrix; of its transpose with .trans (PTX ISA, "ldmatrix").
#include <cstring>

#include "state.h"

namespace ptx {

namespace {

constexpr int kRows = 8, kRowBytes = 16, kLanes = 32;

struct MatrixOperands {
  uint32_t registers[4];
  int count;
  bool transposed;
  unsigned char* row;
  unsigned char stored[kRowBytes];  // what stmatrix writes to `row`
};

void count_rows_of(Fiber* const* lanes, Access kind) {
  uint32_t offsets[kLanes];
  const int rows = kRows * operands<MatrixOperands>(lanes, 0).count;
  for (int i = 0; i < rows; i++) {
    offsets[i] = static_cast<uint32_t>(operands<MatrixOperands>(lanes, i).row - shared_window);
  }
  if (options.count) count_rows(offsets, rows, kind, lanes[0]->site);
}

void resolve_load(Fiber* const* lanes, uint32_t) {
  counts.ldmatrix++;
  count_rows_of(lanes, Access::kRead);
  const MatrixOperands& shape = operands<MatrixOperands>(lanes, 0);
  for (int q = 0; q < shape.count; q++) {
    uint16_t matrix[kRows][kRows];
    for (int r = 0; r < kRows; r++) {
      std::memcpy(matrix[r], operands<MatrixOperands>(lanes, kRows * q + r).row, kRowBytes);
    }
    for (int lane = 0; lane < kLanes; lane++) {
      const int i = lane / 4, j = lane % 4 * 2;
      const uint32_t low = shape.transposed ? matrix[j][i] : matrix[i][j];
      const uint32_t high = shape.transposed ? matrix[j + 1][i] : matrix[i][j + 1];
      operands<MatrixOperands>(lanes, lane).registers[q] = low | high << 16;
    }
  }
}

void resolve_store(Fiber* const* lanes, uint32_t) {
  counts.stmatrix++;
  count_rows_of(lanes, Access::kWrite);
  const MatrixOperands& shape = operands<MatrixOperands>(lanes, 0);
  for (int q = 0; q < shape.count; q++) {
    uint16_t matrix[kRows][kRows];
    for (int lane = 0; lane < kLanes; lane++) {
      const int i = lane / 4, j = lane % 4 * 2;
      const uint32_t pair = operands<MatrixOperands>(lanes, lane).registers[q];
      (shape.transposed ? matrix[j][i] : matrix[i][j]) = static_cast<uint16_t>(pair);
      (shape.transposed ? matrix[j + 1][i] : matrix[i][j + 1]) = static_cast<uint16_t>(pair >> 16);
    }
    for (int r = 0; r < kRows; r++) {
      std::memcpy(operands<MatrixOperands>(lanes, kRows * q + r).stored, matrix[r], kRowBytes);
    }
  }
}

// Only the first 8 · count lanes give an address; each accesses its row as that lane alone.
bool addresses_row(int count, uint32_t site) {
  if (count != 1 && count != 2 && count != 4)
    fatal("unsupported", "matrix count not 1, 2, 4", site);
  return current->lane < static_cast<uint32_t>(kRows * count);
}

void access_row(const void* row, Access kind, uint32_t site, const void* stored = nullptr) {
  access(row, kRowBytes, kind, Space::kShared, site, stored, /*counted=*/false);
}

}  // namespace

void ldmatrix(uint32_t* d, int count, bool transposed, const void* row, uint32_t site) {
  if (addresses_row(count, site)) access_row(row, Access::kRead, site);
  MatrixOperands x{{}, count, transposed, static_cast<unsigned char*>(const_cast<void*>(row)), {}};
  collective("ldmatrix", ~0u, site, &x, resolve_load);
  std::memcpy(d, x.registers, sizeof(uint32_t) * static_cast<size_t>(count));
}

// What a row becomes is known only when all lanes have met: warps that write the same values to
// the same place with one stmatrix, as Triton's replicated layouts do, are no race.
void stmatrix(const uint32_t* d, int count, bool transposed, void* row, uint32_t site) {
  const bool addresses = addresses_row(count, site);
  MatrixOperands x{{}, count, transposed, static_cast<unsigned char*>(row), {}};
  std::memcpy(x.registers, d, sizeof(uint32_t) * static_cast<size_t>(count));
  collective("stmatrix", ~0u, site, &x, resolve_store);
  if (!addresses) return;
  access_row(row, Access::kWrite, site, x.stored);
  std::memcpy(row, x.stored, kRowBytes);
}

}  // namespace ptx
