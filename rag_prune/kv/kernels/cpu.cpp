// Attention over pruned pages, and writing them, on an x86 CPU. What pages are:
// rag_prune/kv/spec.py; what these functions compute: `decode` and `write` of
// rag_prune/kv/pages.py, to which tests hold them.
//
// Decoding reads each page once, as it is stored. Thin keys are channel-major, so a query's entry
// is multiplied with one channel of many tokens and dropped channels are simply not there; a packed
// token is spread over a register by its bitmap. Arithmetic is in float32.
//
// Compiled by cpu.py, for AVX2 or for AVX-512 and for one type of entries: ENTRY is float, BFloat16
// or Float16. Pointers come from torch; strides are in bytes.

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

// ---------------------------------------------------------------------------- what cpu.py passes
extern "C" {
struct Layout {  // fields in the order of cpu.py's _Layout
  int64_t head_size, block_size, kept_keys, kept_values, packed_keys;
  int64_t values_offset, ids_offset;
  int64_t recent, sinks, step, window_slots;
  int64_t kv_heads;
  uint8_t* pages;
  int64_t page_stride, page_head_stride;
  uint8_t* ring;  // null if pages drop nothing
  int64_t ring_stride, ring_head_stride, slots_per_block, slot_bytes;
  int64_t threads;
};
}

namespace {

constexpr int TILE = 128;     // tokens whose weights are computed together
constexpr int HEAD = 256;     // the largest head
constexpr int MAX_GROUP = 8;  // query heads that share registers
constexpr float LN2 = 0.693147181f;
constexpr float NONE = -std::numeric_limits<float>::infinity();

// ---------------------------------------------------------------------------- vectors
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
using Entry = ENTRY;

inline __m256i sixteen(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline __m128i eight(const void* p) { return _mm_loadu_si128((const __m128i*)p); }

#if defined(__AVX512F__)
using Vec = __m512;
constexpr int W = 16;
constexpr int SUMS = 24;  // registers for sums; the other eight hold what is added

inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec load(const BFloat16* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(sixteen(p)), 16));
}
inline Vec load(const Float16* p) { return _mm512_cvtph_ps(sixteen(p)); }
inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
inline Vec all(float x) { return _mm512_set1_ps(x); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec round(Vec x) { return _mm512_roundscale_ps(x, 8); }
inline float highest(Vec x) { return _mm512_reduce_max_ps(x); }
inline __m256 halved(Vec x) {  // a sum of 16 as a sum of 8
  return _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
}
// x · 2^n for whole n; 0 where x is too small to matter.
inline Vec scaled(Vec x, Vec n, Vec least) {
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(n, least, _CMP_GT_OQ), x, n);
}
inline unsigned bits_at(const uint8_t* bitmap) {
  uint16_t bits;
  std::memcpy(&bits, bitmap, 2);
  return bits;
}
// The first entries go to the lanes whose bits are set, in order; the other lanes are 0.
inline Vec expand(Vec x, unsigned bits) { return _mm512_maskz_expand_ps((__mmask16)bits, x); }
#else
using Vec = __m256;
constexpr int W = 8;
constexpr int SUMS = 12;

inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline Vec load(const BFloat16* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(eight(p)), 16));
}
inline Vec load(const Float16* p) { return _mm256_cvtph_ps(eight(p)); }
inline void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
inline Vec all(float x) { return _mm256_set1_ps(x); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec round(Vec x) {
  return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline float highest(Vec x) {
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}
inline __m256 halved(Vec x) { return x; }
inline Vec scaled(Vec x, Vec n, Vec least) {
  __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  __m256 product = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), exponent));
  return _mm256_and_ps(product, _mm256_cmp_ps(n, least, _CMP_GT_OQ));
}

// Where each lane's entry lies for each byte of a bitmap; negative for the lanes that are 0.
constexpr std::array<std::array<int8_t, 8>, 256> make_lanes() {
  std::array<std::array<int8_t, 8>, 256> lanes{};
  for (int bits = 0; bits < 256; bits++)
    for (int lane = 0, at = 0; lane < 8; lane++)
      lanes[bits][lane] = (bits >> lane & 1) ? (int8_t)at++ : (int8_t)-128;
  return lanes;
}
alignas(64) constexpr auto LANES = make_lanes();

inline unsigned bits_at(const uint8_t* bitmap) { return *bitmap; }
inline Vec expand(Vec x, unsigned bits) {
  __m256i lanes = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)LANES[bits].data()));
  Vec moved = _mm256_permutevar8x32_ps(x, lanes);
  return _mm256_blendv_ps(moved, _mm256_setzero_ps(), _mm256_castsi256_ps(lanes));
}
#endif

inline float total(__m256 x) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

// The totals of four vectors.
inline __m128 totals(const Vec x[4]) {
  __m256 low = _mm256_hadd_ps(halved(x[0]), halved(x[1]));
  __m256 high = _mm256_hadd_ps(halved(x[2]), halved(x[3]));
  __m256 four = _mm256_hadd_ps(low, high);
  return _mm_add_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps(four, 1));
}

// 2^x for x <= 0. The Taylor series of 2^f to degree 6 errs by less than 2e-7 for |f| <= 1/2.
inline Vec power(Vec x) {
  const Vec least = all(-126.0f);
  Vec n = round(max(x, least)), f = sub(max(x, least), n);
  Vec y = all(1.5403530e-4f);
  for (float c : {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f})
    y = fma(y, f, all(c));
  return scaled(y, n, least);
}

// ---------------------------------------------------------------------------- packed tokens
struct Packed {
  const uint8_t* bitmap;
  const Entry* entries;

  // The W channels from one on; the token is left after them.
  Vec next(int channel) {
    const unsigned bits = bits_at(bitmap + channel / 8);
    const Vec x = expand(load(entries), bits);
    entries += _mm_popcnt_u32(bits);
    return x;
  }
};

// Reads run past a token's last entry: harmless inside of a page, but what ends a page or a slot
// may also end the memory, so that it is copied to where there is room.
struct Spare {
  Entry entries[HEAD + W];
  const Entry* copy(const Entry* from, int count) {
    std::memcpy(entries, from, count * sizeof(Entry));
    return entries;
  }
};

inline void complement(const uint8_t* bitmap, int bytes, uint8_t* result) {
  for (int i = 0; i < bytes; i++) result[i] = (uint8_t)~bitmap[i];
}

// ---------------------------------------------------------------------------- decoding
struct Sequence {
  const int32_t* table;
  const int32_t* ring;  // null if there is none
  int length;
};

// Tokens of one page, at most TILE of them.
struct Piece {
  const uint8_t* page;
  ptrdiff_t ahead;  // bytes from this page to the next, which is prefetched meanwhile
  int offset;       // of the first token, in the page
  int count;
};

inline void fetch(const void* p, ptrdiff_t ahead, int bytes) {
  for (int i = 0; i < bytes; i += 64) _mm_prefetch((const char*)p + ahead + i, _MM_HINT_T0);
}

// The attention of G query heads that share a KV head, over some of the tokens of a sequence.
template <int G>
class Attention {
 public:
  Attention(const Layout& layout, const Sequence& sequence, int head, const float* queries,
            float scale)
      : at(layout), seq(sequence), head(head), size((int)layout.head_size) {
    // Softmax in powers of two: 2^(x / ln 2) is e^x, and cheaper.
    const float factor = scale * 1.44269504f;
    for (int g = 0; g < G; g++)
      for (int c = 0; c < size; c++) by_channel[c][g] = q[g][c] = queries[g * size + c] * factor;
    std::fill_n(top, G, NONE);
    std::fill_n(sum, G, 0.0f);
    std::memset(out, 0, sizeof out);
  }

  void run(int first, int last) {
    for (int start = first; start < last; start += TILE) tile(start, std::min(start + TILE, last));
  }

  // Of each head the values, not yet divided by the sum of their weights, and the highest logit.
  float out[G][HEAD], sum[G], top[G];

 private:
  // Vectors whose sums for all heads fit into the registers.
  static constexpr int AT_ONCE = SUMS / G >= 8 ? 8 : SUMS / G >= 4 ? 4 : SUMS / G >= 2 ? 2 : 1;

  const Layout& at;
  const Sequence& seq;
  const int head, size;
  float q[G][HEAD];
  float by_channel[HEAD][G];  // the same queries
  float weights[G][TILE];     // logits, then their powers
  Spare spare[4];
  const uint8_t* lost_of = nullptr;  // the page of `lost`
  uint8_t lost[HEAD / 8];            // a bitmap of the keys' entries that it dropped

  void tile(int start, int stop) {
    pieces(start, stop, [&](const Piece& piece, int to) {
      at.packed_keys ? packed_keys(piece, to) : thin_keys(piece, to);
    });
    whole(start, stop, [&](int token, int to) { restore_key(token, to); });
    soften(stop - start);
    pieces(start, stop, [&](const Piece& piece, int from) {
      at.kept_values < size ? packed_values(piece, from) : whole_values(piece, from);
    });
    if (at.kept_values < size)
      whole(start, stop, [&](int token, int from) { restore_value(token, from); });
  }

  // -------------------------------------------------------------------- walking
  const uint8_t* page(int token) const {
    return at.pages + seq.table[token / at.block_size] * at.page_stride +
           head * at.page_head_stride;
  }

  template <class Do>
  void pieces(int start, int stop, Do&& each) {
    const int block = (int)at.block_size;
    for (int token = start; token < stop;) {
      const int offset = token % block, count = std::min(block - offset, stop - token);
      const int next = token - offset + block;
      const uint8_t* here = page(token);
      each(Piece{here, next < seq.length ? page(next) - here : 0, offset, count}, token - start);
      token += count;
    }
  }

  // The tokens that are read whole: the sinks, and those of the newest query's window.
  template <class Do>
  void whole(int start, int stop, Do&& each) {
    if (!seq.ring) return;
    const int cut = std::max(0, seq.length - (int)at.recent) / (int)at.step * (int)at.step;
    for (int t = start; t < std::min(stop, (int)at.sinks); t++) each(t, t - start);
    for (int t = std::max({start, cut, (int)at.sinks}); t < stop; t++) each(t, t - start);
  }

  // -------------------------------------------------------------------- keys
  void thin_keys(const Piece& piece, int to) {
    if (at.kept_keys < size) fetch(piece.page + at.ids_offset, piece.ahead, (int)at.kept_keys);
    channels_from<AT_ONCE>(piece, 0, to);
  }

  // Blocks are multiples of 16 tokens, so that reading past the last token stays in its channel.
  template <int N>
  void channels_from(const Piece& piece, int t, int to) {
    for (; t + N * W <= piece.count || (N == 1 && t < piece.count); t += N * W)
      channels<N>(piece, piece.offset + t, to + t);
    if constexpr (N > 1) channels_from<N / 2>(piece, t, to);
  }

  template <int N>
  void channels(const Piece& piece, int token, int to) {
    const int kept = (int)at.kept_keys;
    const Entry* row = (const Entry*)piece.page + token;
    const uint8_t* ids = kept < size ? piece.page + at.ids_offset : nullptr;
    Vec sums[G][N] = {};
    for (int i = 0; i < kept; i++, row += at.block_size) {
      fetch(row, piece.ahead, N * W * sizeof(Entry));
      const float* query = by_channel[ids ? ids[i] : i];
      Vec keys[N];
      for (int n = 0; n < N; n++) keys[n] = load(row + n * W);
      for (int g = 0; g < G; g++)
        for (int n = 0; n < N; n++) sums[g][n] = fma(all(query[g]), keys[n], sums[g][n]);
    }
    for (int g = 0; g < G; g++)
      for (int n = 0; n < N; n++) store(&weights[g][to + n * W], sums[g][n]);
  }

  void packed_keys(const Piece& piece, int to) {
    int t = 0;
    for (; t + 4 <= piece.count; t += 4) {
      Packed four[4];
      for (int i = 0; i < 4; i++) four[i] = token_at(piece, 0, at.kept_keys, t + i);
      fetch(four[0].bitmap, piece.ahead, 4 * size / 8);
      Vec sums[G][4] = {};
      dots(four, sums);
      for (int g = 0; g < G; g++) _mm_storeu_ps(&weights[g][to + t], totals(sums[g]));
    }
    for (; t < piece.count; t++) {
      Packed one[1] = {token_at(piece, 0, at.kept_keys, t)};
      Vec sums[G][1] = {};
      dots(one, sums);
      for (int g = 0; g < G; g++) weights[g][to + t] = total(halved(sums[g][0]));
    }
  }

  template <int N>
  void dots(Packed (&tokens)[N], Vec (&sums)[G][N]) {
    for (int c = 0; c < size; c += W) {
      Vec x[N];
      for (int n = 0; n < N; n++) x[n] = tokens[n].next(c);
      for (int g = 0; g < G; g++) {
        const Vec query = load(&q[g][c]);
        for (int n = 0; n < N; n++) sums[g][n] = fma(query, x[n], sums[g][n]);
      }
    }
  }

  Packed token_at(const Piece& piece, int64_t start, int64_t kept, int token) {
    token += piece.offset;
    const uint8_t* bitmaps = piece.page + start;
    const Entry* entries = (const Entry*)(bitmaps + at.block_size * size / 8) + token * kept;
    fetch(entries, piece.ahead, (int)kept * sizeof(Entry));
    if ((at.block_size - 1 - token) * kept < W) entries = spare[token % 4].copy(entries, (int)kept);
    return {bitmaps + token * size / 8, entries};
  }

  // -------------------------------------------------------------------- softmax
  // Logits to weights, relative to the highest so far.
  void soften(int count) {
    const int end = (count + W - 1) / W * W;
    for (int g = 0; g < G; g++) {
      std::fill(weights[g] + count, weights[g] + end, NONE);
      Vec high = all(top[g]);
      for (int t = 0; t < end; t += W) high = max(high, load(&weights[g][t]));
      const float now = highest(high);
      Vec added = all(0.0f);
      for (int t = 0; t < end; t += W) {
        Vec weight = power(sub(load(&weights[g][t]), all(now)));
        store(&weights[g][t], weight);
        added = add(added, weight);
      }
      if (now > top[g]) weaken(g, now);
      sum[g] += total(halved(added));
    }
  }

  void weaken(int g, float now) {
    float lanes[W];
    store(lanes, power(all(top[g] - now)));
    top[g] = now;
    sum[g] *= lanes[0];
    for (int c = 0; c < size; c += W) store(&out[g][c], mul(load(&out[g][c]), all(lanes[0])));
  }

  // -------------------------------------------------------------------- values
  void whole_values(const Piece& piece, int from) { columns_from<AT_ONCE>(piece, 0, from); }

  template <int N>
  void columns_from(const Piece& piece, int c, int from) {
    for (; c + N * W <= size; c += N * W) columns<N>(piece, c, from);
    if constexpr (N > 1) columns_from<N / 2>(piece, c, from);
  }

  template <int N>
  void columns(const Piece& piece, int channel, int from) {
    const Entry* row =
        (const Entry*)(piece.page + at.values_offset) + (int64_t)piece.offset * size + channel;
    Vec sums[G][N];
    for (int g = 0; g < G; g++)
      for (int n = 0; n < N; n++) sums[g][n] = load(&out[g][channel + n * W]);
    for (int t = 0; t < piece.count; t++, row += size) {
      fetch(row, piece.ahead, N * W * sizeof(Entry));
      Vec values[N];
      for (int n = 0; n < N; n++) values[n] = load(row + n * W);
      for (int g = 0; g < G; g++)
        for (int n = 0; n < N; n++)
          sums[g][n] = fma(all(weights[g][from + t]), values[n], sums[g][n]);
    }
    for (int g = 0; g < G; g++)
      for (int n = 0; n < N; n++) store(&out[g][channel + n * W], sums[g][n]);
  }

  void packed_values(const Piece& piece, int from) {
    int t = 0;
    for (; t + 4 <= piece.count; t += 4) {
      Packed four[4];
      for (int i = 0; i < 4; i++)
        four[i] = token_at(piece, at.values_offset, at.kept_values, t + i);
      fetch(four[0].bitmap, piece.ahead, 4 * size / 8);
      add_all(four, from + t);
    }
    for (; t < piece.count; t++) {
      Packed one[1] = {token_at(piece, at.values_offset, at.kept_values, t)};
      add_all(one, from + t);
    }
  }

  template <int N>
  void add_all(Packed (&tokens)[N], int from) {
    for (int c = 0; c < size; c += W) {
      Vec x[N];
      for (int n = 0; n < N; n++) x[n] = tokens[n].next(c);
      for (int g = 0; g < G; g++) {
        Vec sums = load(&out[g][c]);
        for (int n = 0; n < N; n++) sums = fma(all(weights[g][from + n]), x[n], sums);
        store(&out[g][c], sums);
      }
    }
  }

  // -------------------------------------------------------------------- the ring
  // The rest of a token's key and value; null if its slot holds another token's, or nothing.
  const Entry* rest(int token) const {
    const int window = (int)at.window_slots, sinks = (int)at.sinks;
    const int slot = token < sinks ? token : sinks + (token - sinks) % window;
    const uint8_t* block = at.ring + seq.ring[slot / at.slots_per_block] * at.ring_stride;
    const uint8_t* entry =
        block + head * at.ring_head_stride + slot % at.slots_per_block * at.slot_bytes;
    int32_t tag;
    std::memcpy(&tag, entry, 4);
    return tag == token + 1 ? (const Entry*)(entry + 4) : nullptr;
  }

  void restore_key(int token, int to) {
    const Entry* entries = rest(token);
    const int count = size - (int)at.kept_keys;
    if (!entries || !count) return;
    find_lost_keys(token);
    Packed one[1] = {{lost, spare[0].copy(entries, count)}};
    Vec sums[G][1] = {};
    dots(one, sums);
    for (int g = 0; g < G; g++) weights[g][to] += total(halved(sums[g][0]));
  }

  void restore_value(int token, int from) {
    const Entry* entries = rest(token);
    if (!entries) return;
    const uint8_t* bitmaps = page(token) + at.values_offset;
    uint8_t bitmap[HEAD / 8];
    complement(bitmaps + token % at.block_size * size / 8, size / 8, bitmap);
    entries += size - at.kept_keys;
    Packed one[1] = {{bitmap, spare[0].copy(entries, size - (int)at.kept_values)}};
    add_all(one, from);
  }

  void find_lost_keys(int token) {
    const uint8_t* here = page(token);
    if (at.packed_keys) return complement(here + token % at.block_size * size / 8, size / 8, lost);
    if (here == lost_of) return;
    lost_of = here;
    std::memset(lost, 255, size / 8);
    const uint8_t* ids = here + at.ids_offset;
    for (int i = 0; i < at.kept_keys; i++) lost[ids[i] / 8] &= (uint8_t)~(1 << ids[i] % 8);
  }
};

// One task: some tokens of a sequence, for some of the heads that share a KV head.
struct Task {
  int head, first, last;
  const float* queries;
  float* out;     // [heads][head_size]
  float* totals;  // [heads][2], highest logit, in powers of two, and sum relative to it
};

template <int G>
void attend(const Layout& at, const Sequence& sequence, const Task& task, float scale) {
  Attention<G> attention(at, sequence, task.head, task.queries, scale);
  attention.run(task.first, task.last);
  for (int g = 0; g < G; g++) {
    const float sum = attention.sum[g], share = sum > 0 ? 1 / sum : 0;  // zeros without tokens
    float* out = task.out + g * at.head_size;
    for (int c = 0; c < at.head_size; c++) out[c] = attention.out[g][c] * share;
    task.totals[2 * g] = attention.top[g];
    task.totals[2 * g + 1] = sum;
  }
}

void attend(const Layout& at, const Sequence& sequence, const Task& task, int group, float scale) {
  using Run = void (*)(const Layout&, const Sequence&, const Task&, float);
  static constexpr Run runs[MAX_GROUP] = {attend<1>, attend<2>, attend<3>, attend<4>,
                                          attend<5>, attend<6>, attend<7>, attend<8>};
  runs[group - 1](at, sequence, task, scale);
}

// Joins what the parts of a sequence gave, each already divided by its own sum.
// Leaves the highest logit where that of the first part was, and returns the sum relative to it.
float join(const float* outs, float* totals, int parts, int64_t stride, int size, float* out) {
  float top = NONE, sum = 0;
  for (int p = 0; p < parts; p++) top = std::max(top, totals[p * stride * 2]);
  std::fill_n(out, size, 0.0f);
  float shares[W];
  for (int p = 0; p < parts; p++) {
    store(shares, power(all(totals[p * stride * 2] - top)));
    const float weight = shares[0] * totals[p * stride * 2 + 1];
    sum += weight;
    for (int c = 0; c < size; c++) out[c] += weight * outs[p * stride * size + c];
  }
  for (int c = 0; c < size; c++) out[c] /= sum;
  totals[0] = top;
  return sum;
}

// ---------------------------------------------------------------------------- writing
inline uint32_t magnitude(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits & 0x7fffffff;
}
inline uint32_t magnitude(BFloat16 x) { return x.bits & 0x7fffu; }
inline uint32_t magnitude(Float16 x) { return x.bits & 0x7fffu; }

// The bitmap of the `kept` entries of largest magnitude, ties to the lower channel. As whole
// numbers the bits of floats without sign are in the order of the floats, so the smallest magnitude
// kept is found bit by bit.
void largest(const Entry* x, int size, int kept, uint8_t* bitmap) {
  uint32_t magnitudes[HEAD], least = 0;
  for (int c = 0; c < size; c++) magnitudes[c] = magnitude(x[c]);
  for (uint32_t bit = 1u << (8 * sizeof(Entry) - 2); bit; bit >>= 1) {
    int count = 0;
    for (int c = 0; c < size; c++) count += magnitudes[c] >= (least | bit);
    if (count >= kept) least |= bit;
  }
  int ties = kept;
  for (int c = 0; c < size; c++) ties -= magnitudes[c] > least;
  std::memset(bitmap, 0, size / 8);
  for (int c = 0; c < size; c++)
    if (magnitudes[c] > least || (magnitudes[c] == least && ties-- > 0))
      bitmap[c / 8] |= 1 << c % 8;
}

Entry* gather(const Entry* x, const uint8_t* bitmap, int size, Entry* to) {
  for (int c = 0; c < size; c++)
    if (bitmap[c / 8] >> c % 8 & 1) *to++ = x[c];
  return to;
}

// A bitmap and its entries into a page; `bitmap` is also left to the caller.
void pack(const Layout& at, const Entry* x, int64_t kept, int offset, uint8_t* part,
          uint8_t* bitmap) {
  const int size = (int)at.head_size;
  largest(x, size, (int)kept, bitmap);
  std::memcpy(part + offset * size / 8, bitmap, size / 8);
  gather(x, bitmap, size, (Entry*)(part + at.block_size * size / 8) + offset * kept);
}

void thin(const Layout& at, const Entry* x, int offset, uint8_t* page, uint8_t* bitmap) {
  const int size = (int)at.head_size;
  const uint8_t* ids = at.kept_keys < size ? page + at.ids_offset : nullptr;
  Entry* to = (Entry*)page + offset;
  std::memset(bitmap, 0, size / 8);
  for (int i = 0; i < at.kept_keys; i++, to += at.block_size) {
    const int channel = ids ? ids[i] : i;
    *to = x[channel];
    bitmap[channel / 8] |= 1 << channel % 8;
  }
}

struct Token {
  int block, position, length;
  const int32_t* ring;
};

void write_one(const Layout& at, const Token& token, int head, const Entry* key,
               const Entry* value) {
  const int size = (int)at.head_size, offset = token.position % (int)at.block_size;
  uint8_t* page = at.pages + token.block * at.page_stride + head * at.page_head_stride;
  uint8_t keys[HEAD / 8], values[HEAD / 8];  // bitmaps of what the page keeps
  if (at.packed_keys)
    pack(at, key, at.kept_keys, offset, page, keys);
  else
    thin(at, key, offset, page, keys);
  uint8_t* part = page + at.values_offset;
  if (at.kept_values < size) {
    pack(at, value, at.kept_values, offset, part, values);
  } else {
    std::memcpy(part + offset * size * sizeof(Entry), value, size * sizeof(Entry));
    std::memset(values, 255, size / 8);
  }
  const int window = (int)at.window_slots, sinks = (int)at.sinks;
  if (!token.ring || (token.position >= sinks && token.position < token.length - window)) return;
  const int slot =
      token.position < sinks ? token.position : sinks + (token.position - sinks) % window;
  uint8_t* to = at.ring + token.ring[slot / at.slots_per_block] * at.ring_stride +
                head * at.ring_head_stride + slot % at.slots_per_block * at.slot_bytes;
  const int32_t tag = token.position + 1;
  std::memcpy(to, &tag, 4);
  complement(keys, size / 8, keys);
  complement(values, size / 8, values);
  gather(value, values, size, gather(key, keys, size, (Entry*)(to + 4)));
}

}  // namespace

// ---------------------------------------------------------------------------- what cpu.py calls
extern "C" {

// queries, out: float32 [rows][heads][head_size], contiguous. log_sums: float32 [rows][heads], of
// the exponentials of all logits; null if they are not asked for.
void prunekit_decode(const Layout* layout, int64_t rows, int64_t heads, float scale, int64_t parts,
                     const float* queries, const int32_t* table, int64_t table_stride,
                     const int32_t* lengths, const int32_t* rings, int64_t rings_stride,
                     float* out, float* log_sums) {
  const Layout& at = *layout;
  const int size = (int)at.head_size, group = (int)(heads / at.kv_heads);
  const int chunks = (group + MAX_GROUP - 1) / MAX_GROUP;  // of the heads that share a KV head
  const int64_t stride = rows * heads;                     // of a part, in heads
  std::vector<float> outs(parts > 1 ? parts * stride * size : 0), totals(parts * stride * 2);
  const int64_t tasks = rows * at.kv_heads * chunks * parts;
#pragma omp parallel for schedule(dynamic) num_threads((int)at.threads)
  for (int64_t i = 0; i < tasks; i++) {
    const int64_t part = i % parts, chunk = i / parts % chunks, pair = i / parts / chunks;
    const int64_t row = pair / at.kv_heads, head = pair % at.kv_heads;
    const int64_t first_head = row * heads + head * group + chunk * MAX_GROUP;
    const Sequence sequence{table + row * table_stride,
                            rings ? rings + row * rings_stride : nullptr, lengths[row]};
    // Parts end where tiles do, so that all but the last are full.
    const int tiles = (sequence.length + TILE - 1) / TILE;
    const int first = (int)(tiles * part / parts) * TILE,
              last = (int)(tiles * (part + 1) / parts) * TILE;
    Task task{(int)head, first,  std::min(last, sequence.length), queries + first_head * size,
              nullptr,   nullptr};
    task.out = parts > 1 ? &outs[(part * stride + first_head) * size] : out + first_head * size;
    task.totals = &totals[(part * stride + first_head) * 2];
    const int these = std::min(MAX_GROUP, group - (int)chunk * MAX_GROUP);
    attend(at, sequence, task, these, scale);
  }
  for (int64_t i = 0; i < stride; i++) {
    float sum = totals[i * 2 + 1];
    if (parts > 1) sum = join(&outs[i * size], &totals[i * 2], (int)parts, stride, size, out + i * size);
    if (log_sums) log_sums[i] = totals[i * 2] * LN2 + std::log(sum);
  }
}

// keys, values: of the entries' type, [tokens][kv_heads][head_size], the last dimension contiguous.
void prunekit_write(const Layout* layout, int64_t tokens, const int32_t* blocks,
                    const int32_t* positions, const int32_t* lengths, const int32_t* rings,
                    int64_t rings_stride, const uint8_t* keys, int64_t key_stride,
                    int64_t key_head_stride, const uint8_t* values, int64_t value_stride,
                    int64_t value_head_stride) {
  const Layout& at = *layout;
  // Neighbours go to one thread: entries of a channel of thin keys share a cache line.
#pragma omp parallel for collapse(2) schedule(static) num_threads((int)at.threads)
  for (int64_t head = 0; head < at.kv_heads; head++)
    for (int64_t i = 0; i < tokens; i++) {
      const Token token{blocks[i], positions[i], lengths[i],
                        rings ? rings + i * rings_stride : nullptr};
      write_one(at, token, (int)head,
                (const Entry*)(keys + i * key_stride + head * key_head_stride),
                (const Entry*)(values + i * value_stride + head * value_head_stride));
    }
}
}
