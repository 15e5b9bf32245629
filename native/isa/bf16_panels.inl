// bf16 linear layers in tiles of at most 4 tokens, for instruction sets with few registers. The file that includes this
// one defines kTile = 4, kTokenBlock and bf16_tile<M, R> before, in the same namespace.

// m <= kTile tokens. One token takes panels in fours: a single one would wait for each multiply-add.
void bf16_panels(const Packed& w, int p0, int p1, const bf16* x, size_t ldx, int m, float* out, size_t ldo, bool add) {
  int p = p0;
  if (m == 1)
    for (; p + 4 <= p1; p += 4) bf16_tile<1, 4>(w, p, x, ldx, out, ldo, add);
  for (; p < p1; p++) switch (m) {
      case 4: bf16_tile<4, 1>(w, p, x, ldx, out, ldo, add); break;
      case 3: bf16_tile<3, 1>(w, p, x, ldx, out, ldo, add); break;
      case 2: bf16_tile<2, 1>(w, p, x, ldx, out, ldo, add); break;
      case 1: bf16_tile<1, 1>(w, p, x, ldx, out, ldo, add); break;
      default: return;
    }
}

void linear_bf16(const Packed& w, int p0, int p1, const bf16* x, size_t ldx, int m, float* out, size_t ldo, bool add) {
  if (m <= kTile) return bf16_panels(w, p0, p1, x, ldx, m, out, ldo, add);
  for (int t0 = 0; t0 < m; t0 += kTokenBlock)
    for (int p = p0; p < p1; p++) {
      const int t1 = std::min(m, t0 + kTokenBlock);
      for (int t = t0; t < t1; t += kTile)
        bf16_panels(w, p, p + 1, x + t * ldx, ldx, std::min(kTile, t1 - t), out + t * ldo, ldo, add);
    }
}
