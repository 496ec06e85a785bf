// Where the elements of K lie that a rotation by a position difference changes. Free of includes; see paged_index.h.

#ifndef KVTIER_DEVICE
#define KVTIER_DEVICE static inline
#endif

namespace kvtier {

using i64 = long long;
using u64 = unsigned long long;

constexpr int kMaxSpans = 64;  // of one launch

// Some tokens of one block that all move by the same number of positions.
struct RopeSpan {
  i64 block_id;
  int first_token;
  int num_tokens;
  int row;       // of the table of cosines and sines
  int reserved;
};

// Everything the rotation is told. Passed by value. Strides are in bytes.
struct RopeShift {
  u64 bases;          // u64[num_layers]: address of each layer's K of block 0, token 0, head 0, dimension 0
  u64 cos_sin;        // float[rows][num_pairs][2]
  i64 num_layers;
  i64 num_spans;      // 1..kMaxSpans
  i64 block_tokens;   // the most tokens of a span
  i64 num_heads;
  i64 num_pairs;      // half of the dimensions that are rotated
  i64 block_stride;
  i64 token_stride;
  i64 head_stride;
  i64 dim_stride;
  i64 pairs_per_item; // 1, or 4: neighbouring pairs that one thread takes with wide accesses
  RopeSpan spans[kMaxSpans];
};

static_assert(sizeof(RopeSpan) == 24, "RopeSpan: see cuda_params.py");
static_assert(sizeof(RopeShift) == 96 + 24 * kMaxSpans, "RopeShift: see cuda_params.py");

// The pairs of one item; `address` is of dimension 0 of the head. An item past the end of its span has no pairs.
struct RopeItem {
  u64 address;
  i64 first_pair;
  i64 num_pairs;
  i64 row;
};

KVTIER_DEVICE i64 num_items(const RopeShift& shift) {
  const i64 groups = shift.num_pairs / shift.pairs_per_item;
  return shift.num_layers * shift.num_spans * shift.block_tokens * shift.num_heads * groups;
}

// Items run over layer, span, token, head, group of pairs; the last of these fastest.
KVTIER_DEVICE RopeItem item_at(const RopeShift& shift, i64 item) {
  const i64 groups = shift.num_pairs / shift.pairs_per_item;
  const i64 group = item % groups;
  item /= groups;
  const i64 head = item % shift.num_heads;
  item /= shift.num_heads;
  const i64 token = item % shift.block_tokens;
  item /= shift.block_tokens;
  const RopeSpan& span = shift.spans[item % shift.num_spans];
  const i64 layer = item / shift.num_spans;
  const i64 offset = span.block_id * shift.block_stride + (span.first_token + token) * shift.token_stride + head * shift.head_stride;
  RopeItem found;
  found.address = reinterpret_cast<const u64*>(shift.bases)[layer] + static_cast<u64>(offset);
  found.first_pair = group * shift.pairs_per_item;
  found.num_pairs = token < span.num_tokens ? shift.pairs_per_item : 0;
  found.row = span.row;
  return found;
}

}  // namespace kvtier
