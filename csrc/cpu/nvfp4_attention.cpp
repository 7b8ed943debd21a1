#include "nvfp4_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "float16.h"
#include "words.h"

namespace xlayer::cpu {
namespace {

constexpr int SCALES = 256;
constexpr int NIBBLES = 16;
constexpr int KEYS = 64;  // decoded at a time
constexpr int TILE = 16;  // tokens that are read from one place
constexpr double INF = std::numeric_limits<double>::infinity();

// What every (block scale, nibble) stands for without a global scale: exact.
struct DecodeTable {
  double values[SCALES][NIBBLES];

  DecodeTable() {
    for (int scale = 0; scale < SCALES; ++scale) {
      for (int nibble = 0; nibble < NIBBLES; ++nibble) {
        values[scale][nibble] = double(e4m3_decode(uint8_t(scale))) * double(e2m1_decode(uint32_t(nibble)));
      }
    }
  }
};

void decode_token(const Page& page, const uint8_t* page_bytes, bool is_v, int h, int n, ScaleOrder order,
                  double* out) {
  static const DecodeTable table;
  const uint8_t* data = page_bytes + page.data_offset(is_v, h, n);
  const uint8_t* scales = page_bytes + page.scale_base(is_v, h);
  for (int s = 0; s < page.scales(); ++s) {
    const double* values = table.values[scales[page.scale_index(order, n, s)]];
    for (int w = 0; w < GROUP / WORD_ELEMENTS; ++w) {
      const uint32_t nibbles = load_word(data + s * (GROUP / 2) + 4 * w);
      for (int i = 0; i < WORD_ELEMENTS; ++i) {
        out[s * GROUP + w * WORD_ELEMENTS + i] = values[nibbles >> (4 * i) & 15];
      }
    }
  }
}

// A token as it was before it was quantised, in units of the global scale, as decode_token has it.
template <typename T>
void widen_token(const T* in, int head_size, double global_scale, double* out) {
  for (int d = 0; d < head_size; ++d) out[d] = double(to_float(in[d])) / global_scale;
}

// Independent sums, so that the loop becomes vector code.
double dot(const double* a, const double* b, int size) {
  double sums[GROUP] = {};
  for (int i = 0; i < size; i += GROUP) {
    for (int j = 0; j < GROUP; ++j) sums[j] += a[i + j] * b[i + j];
  }
  for (int width = GROUP / 2; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) sums[j] += sums[j + width];
  }
  return sums[0];
}

// One query token and head: what it sees, and its softmax so far.
struct Row {
  int64_t token;            // row of q and of out
  int head;                 // query head
  int64_t first, last;      // sees keys [first, last); last <= 0: the token does not exist
  std::vector<double> q;    // [D]
  std::vector<double> sum;  // [D] of exp(score - maximum) * V
  double maximum;
  double denominator;

  void add(double score, const double* v) {
    // A NaN score leaves the maximum alone and makes the weight NaN.
    if (score > maximum) {
      const double factor = std::exp(maximum - score);
      for (double& x : sum) x *= factor;
      denominator *= factor;
      maximum = score;
    }
    const double weight = std::exp(score - maximum);
    denominator += weight;
    for (size_t i = 0; i < sum.size(); ++i) sum[i] += weight * v[i];
  }
};

// The rows of KV head h of request r.
template <typename T>
std::vector<Row> make_rows(const Nvfp4AttentionParams& p, int r, int h) {
  const int group = p.num_q_heads / p.page.heads;
  const Queries queries = queries_of(p, r);
  std::vector<Row> rows;
  for (int i = 0; i < queries.count; ++i) {
    const int64_t last = p.merges ? p.seq_lens[r] : int64_t(p.seq_lens[r]) - queries.count + i + 1;
    const int64_t first = p.window > 0 ? std::max<int64_t>(0, last - p.window) : 0;
    for (int g = 0; g < group; ++g) {
      Row row = {int64_t(queries.begin) + i, h * group + g, first, last, {}, {}, -INF, 0.0};
      const T* q = static_cast<const T*>(p.q) + row.token * p.q_stride_t + row.head * p.q_stride_h;
      std::vector<float> query;
      for (int d = 0; d < p.page.head_size; ++d) query.push_back(to_float(q[d]));
      const int block = rotation_block(p.page.head_size);
      for (int d = 0; p.rotated_keys && d < p.page.head_size; d += block) {
        rotate_block(&query[size_t(d)], block, rotation_back(block));
      }
      row.q.assign(query.begin(), query.end());
      row.sum.assign(size_t(p.page.head_size), 0.0);
      if (p.sinks != nullptr) {
        row.maximum = p.sinks[row.head];
        row.denominator = 1.0;
      }
      rows.push_back(std::move(row));
    }
  }
  return rows;
}

// What out and lse hold of the row: as one key more, with their value and a score that is their lse.
template <typename T>
void merge(const Nvfp4AttentionParams& p, Row& row) {
  const double lse = p.lse[row.head * p.lse_stride_h + row.token];
  if (lse == -INF) return;
  const T* out = static_cast<const T*>(p.out) + row.token * p.out_stride_t + row.head * p.out_stride_h;
  std::vector<double> value;
  for (int d = 0; d < p.page.head_size; ++d) value.push_back(double(to_float(out[d])) / *p.v_scale);
  row.add(lse, value.data());
}

template <typename T>
void store(const Nvfp4AttentionParams& p, const Row& row) {
  const bool exists = row.last > 0;
  T* out = static_cast<T*>(p.out) + row.token * p.out_stride_t + row.head * p.out_stride_h;
  for (int d = 0; d < p.page.head_size; ++d) {
    out[d] = from_float<T>(exists ? float(row.sum[size_t(d)] / row.denominator * *p.v_scale) : 0.0f);
  }
  if (p.lse == nullptr) return;
  const double lse = exists ? row.maximum + std::log(row.denominator) : -INF;
  p.lse[row.head * p.lse_stride_h + row.token] = float(lse);
}

template <typename T>
void attend(const Nvfp4AttentionParams& p, int r, int h) {
  const Page& page = p.page;
  const double scale = double(p.scale) * double(*p.k_scale);
  const double cap = p.soft_cap;
  const int64_t newest_from = p.newest != nullptr ? p.newest_from[r] : p.seq_lens[r];
  std::vector<Row> rows = make_rows<T>(p, r, h);
  if (rows.empty()) return;
  std::vector<double> k(size_t(KEYS * page.head_size)), v(k.size());
  for (int64_t base = rows.front().first; base < p.seq_lens[r]; base += KEYS) {
    const int64_t end = std::min<int64_t>(base + KEYS, p.seq_lens[r]);
    for (int64_t key = base; key < end; ++key) {
      double* k_out = &k[size_t((key - base) * page.head_size)];
      double* v_out = &v[size_t((key - base) * page.head_size)];
      if (key / TILE * TILE >= newest_from) {
        const T* newest = static_cast<const T*>(p.newest);
        const int64_t row = p.newest_rows[r], place = key % p.newest_tokens;
        const T* k_in = newest + newest_offset(page, p.newest_tokens, row, false, h, place);
        const T* v_in = newest + newest_offset(page, p.newest_tokens, row, true, h, place);
        widen_token(k_in, page.head_size, *p.k_scale, k_out);
        widen_token(v_in, page.head_size, *p.v_scale, v_out);
        continue;
      }
      const int64_t block = p.block_table[r * p.block_table_stride + key / page.block_size];
      const uint8_t* bytes = p.cache + block * p.block_stride;
      const int n = int(key % page.block_size);
      decode_token(page, bytes, false, h, n, ScaleOrder::LINEAR, k_out);
      decode_token(page, bytes, true, h, n, p.v_order, v_out);
    }
    for (Row& row : rows) {
      for (int64_t key = std::max(base, row.first); key < std::min(end, row.last); ++key) {
        const size_t at = size_t((key - base) * page.head_size);
        double score = dot(row.q.data(), &k[at], page.head_size) * scale;
        if (cap > 0) score = cap * std::tanh(score / cap);
        row.add(score, &v[at]);
      }
    }
  }
  for (Row& row : rows) {
    if (p.merges && row.last <= 0) continue;
    if (p.merges) merge<T>(p, row);
    store<T>(p, row);
  }
}

}  // namespace

void nvfp4_attention(const Nvfp4AttentionParams& params, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int r = int(i / params.page.heads), h = int(i % params.page.heads);
    if (params.dtype == Dtype::BF16) {
      attend<BF16>(params, r, h);
    } else {
      attend<F16>(params, r, h);
    }
  }
}

}  // namespace xlayer::cpu
