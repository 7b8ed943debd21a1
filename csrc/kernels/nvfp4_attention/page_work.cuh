// How requests lie on the line of the kernel that works on whole pages (page_decode.cuh), and what a part of
// it is.
//
// The line is of costs. A tile here is 16 tokens of all KV heads, of one request and row tile: 8 of a KV
// head's query rows. Each request and row tile has, in this order,
//
//   | run |p|p|p| ... |p|p| newest | newest |
//
// what it costs to begin and to end a run; its pages, one each; its tiles of newest tokens, `newest` each.
// Where all are equally long and longer than a part, nothing may follow, so that each is so many parts. A
// tile belongs to the part where its costs begin. As long as no tile costs more than a part holds, every part
// from that of the first tile to that of the last has one of them.
#pragma once

#include "work.cuh"

namespace xlayer::attention {

struct PageLine {
  int pages, newest;  // tiles

  // seen: of a request, in units of TILE.
  __device__ __forceinline__ PageLine(const Nvfp4AttentionParams& p, int request, const Range& seen) {
    const int all = seen.units;
    pages = all;
    if (p.newest_from != nullptr) {
      pages = min(max(newest_tile(p, request, seen.last) - seen.begin_unit, 0), all);
    }
    newest = all - pages;
  }

  __device__ __forceinline__ int tiles() const { return pages + newest; }

  // 0 where there is nothing to attend to.
  __device__ __forceinline__ int length(const PageCosts& cost) const {
    return tiles() == 0 ? 0 : cost.run + pages + newest * cost.newest;
  }

  // Tiles that begin before `position`.
  __device__ __forceinline__ int tiles_before(int position, const PageCosts& cost) const {
    const int x = max(position - cost.run, 0);
    return x <= pages ? x : min(pages + (x - pages + cost.newest - 1) / cost.newest, tiles());
  }

  __device__ __forceinline__ int first_begin(const PageCosts& cost) const { return cost.run; }
  __device__ __forceinline__ int last_begin(const PageCosts& cost) const {
    return cost.run + (newest > 0 ? pages + (newest - 1) * cost.newest : pages - 1);
  }
};

// Tiles of one request and row tile that one part has, and what there is to know of them.
struct PageRun {
  int begin, end;        // tiles, of the request's
  int pages_end;         // where newest tokens begin
  int first_seen, last;  // tokens of the request that some query sees
  int queries, q_len;    // its query tokens: the first in the batch, and how many
  int request, row_tile;
  int part, next;             // what comes next on the line
  int first_part, last_part;  // those that have tiles of this request and row tile

  __device__ __forceinline__ bool whole() const { return first_part == last_part; }
};

// A run's, for each warp in shared memory: in registers all this would be in the way of the tiles'
// arithmetic. What is read from there is read anew behind each barrier.
struct PageNotes {
  PageRun run;
  int pages;   // tiles; the others are newest tokens'
  int fills;   // what is copied for them: page_ring.cuh
  int number;  // of the first fill among all of the block

  __device__ __forceinline__ void begin() {
    fills = number = 0;
    __syncwarp();
  }

  // newest_stages: fills of a tile of newest tokens.
  __device__ __forceinline__ void write(const PageRun& made, int newest_stages) {
    const int next = number + fills, made_pages = max(min(made.end, made.pages_end) - made.begin, 0);
    __syncwarp();  // the last run's have been read
    if ((threadIdx.x & 31) == 0) {
      run = made;
      pages = made_pages;
      fills = made_pages + (made.end - made.begin - made_pages) * newest_stages;
      number = next;
    }
    __syncwarp();
  }
};

}  // namespace xlayer::attention
