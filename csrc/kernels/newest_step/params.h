// newest_step: which places of the newest tokens' memory a step writes, and which it may read.
//
// Each running request has a row of `newest_tokens` places; token p has place p % newest_tokens. Of every row
// two numbers are kept, so that nobody reads what another request left there, or what was overwritten:
//
//   first    tokens before it were not written by this request since it was last started (a prompt found in
//            the cache, say)
//   end      one past the furthest token it has written. Drafts that were rejected count: their places held
//            tokens that are newest_tokens before them, and hold them no longer.
//
// So token p < seq_len is in its place if first <= p and end - newest_tokens <= p. Both are -1 in a row whose
// request was just started: whoever starts one must set that.
#pragma once

#include "../common/host_device.h"

namespace xlayer {

struct NewestStepParams {
  const int32_t* query_starts;  // [R + 1] where each request's tokens begin in the batch
  const int32_t* seq_lens;      // [R] tokens, those of this step included
  const int32_t* rows;          // [R] of `state`; negative: none
  const int64_t* slot_mapping;  // [T] negative: the token is not written
  int32_t* state;               // [rows][2] first, end
  int64_t* newest_slots;        // [T] written: row * newest_tokens + place, or -1
  int32_t* newest_from;         // [R] written: the first token that may be read from its place, or INT32_MAX
  int num_requests;             // R
  int64_t num_tokens;           // T
  int newest_tokens;
};

// One request's tokens of a step: positions [first, end), query_starts[r] on in the batch.
struct NewestSpan {
  int64_t begin;   // in the batch
  int first, end;  // positions; end <= first: nothing is written
  int row;
};

XLAYER_HD NewestSpan newest_span(const NewestStepParams& p, int r) {
  const int64_t begin = p.query_starts[r], end = p.query_starts[r + 1];
  const int tokens = int((end < p.num_tokens ? end : p.num_tokens) - begin);
  NewestSpan span = {begin, p.seq_lens[r] - int(end - begin), p.seq_lens[r], p.rows[r]};
  // A padding row, a run without a cache, or a request that is not at a position of its own.
  const bool writes = tokens == int(end - begin) && tokens > 0 && span.row >= 0 && span.first >= 0 &&
                      p.slot_mapping[begin] >= 0;
  if (!writes) span.end = span.first;
  return span;
}

// Brings the row's numbers up to date with the step; returns newest_from.
XLAYER_HD int32_t advance_newest(const NewestStepParams& p, const NewestSpan& span) {
  if (span.end <= span.first) return INT32_MAX;
  int32_t* row = p.state + 2 * int64_t(span.row);
  if (span.first > row[1]) {  // just started, or tokens came from elsewhere
    row[0] = span.first;
    row[1] = span.end;
  } else if (span.end > row[1]) {
    row[1] = span.end;
  }
  if (span.first < row[0]) row[0] = span.first;
  const int held = row[1] - p.newest_tokens;
  return held > row[0] ? held : row[0];
}

// Where the step's i-th token of a request goes. Of more than newest_tokens only the last have a place.
XLAYER_HD int64_t newest_slot(const NewestStepParams& p, const NewestSpan& span, int i) {
  const int position = span.first + i;
  if (position < span.end - p.newest_tokens || position >= span.end) return -1;
  if (p.slot_mapping[span.begin + i] < 0) return -1;
  return int64_t(span.row) * p.newest_tokens + position % p.newest_tokens;
}

}  // namespace xlayer
