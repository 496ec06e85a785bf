// From where to where the rows of a layer's chunks go. Free of includes; see paged_index.h.

#ifndef KVTIER_DEVICE
#define KVTIER_DEVICE static inline
#endif

namespace kvtier {

using i64 = long long;
using u64 = unsigned long long;

// One token of a chunk. Offsets are in bytes, of head 0.
struct RowToken {
  i64 from;  // from PlaceRows::source
  i64 to;    // from PlaceRows::keys, and from PlaceRows::values
  i64 turn;  // row of the table of cosines and sines; -1: the key stays as it is
};

// Everything the kernel is told. Passed by value. Strides are in bytes; a token's elements of one head lie side by side.
struct PlaceRows {
  u64 source;              // of one layer: the first slot's keys
  u64 keys;                // of that layer of the prompt: head 0, position 0
  u64 values;
  u64 tokens;              // RowToken[num_tokens]
  u64 cos_sin;             // float[rows][num_pairs][2]
  i64 num_tokens;
  i64 num_heads;
  i64 num_pairs;           // half of the dimensions of a head
  i64 value_offset;        // from a key in the source to its value
  i64 source_head_stride;
  i64 target_head_stride;
  i64 pairs_per_item;      // 1, or 4: neighbouring pairs that one thread takes with wide accesses
};

static_assert(sizeof(RowToken) == 24, "RowToken: see cuda_rows.py");
static_assert(sizeof(PlaceRows) == 96, "PlaceRows: see cuda_rows.py");

// Some neighbouring pairs of one head of one token: addresses are of dimension 0.
struct RowItem {
  u64 from_key;
  u64 from_value;
  u64 to_key;
  u64 to_value;
  i64 first_pair;
  i64 turn;
};

KVTIER_DEVICE i64 num_items(const PlaceRows& place) {
  return place.num_tokens * place.num_heads * (place.num_pairs / place.pairs_per_item);
}

// Items run over token, head, group of pairs; the last of these fastest.
KVTIER_DEVICE RowItem item_at(const PlaceRows& place, i64 item) {
  const i64 groups = place.num_pairs / place.pairs_per_item;
  const i64 group = item % groups;
  item /= groups;
  const i64 head = item % place.num_heads;
  const RowToken& token = reinterpret_cast<const RowToken*>(place.tokens)[item / place.num_heads];
  RowItem found;
  found.from_key = place.source + static_cast<u64>(token.from + head * place.source_head_stride);
  found.from_value = found.from_key + static_cast<u64>(place.value_offset);
  const u64 to = static_cast<u64>(token.to + head * place.target_head_stride);
  found.to_key = place.keys + to;
  found.to_value = place.values + to;
  found.first_pair = group * place.pairs_per_item;
  found.turn = token.turn;
  return found;
}

}  // namespace kvtier
