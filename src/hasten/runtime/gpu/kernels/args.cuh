// What the host hands over; hasten/runtime/gpu/persistent.py has the same fields in the same order.
struct Args {
  const u8 *qkv, *o, *gate_up, *down, *head;                  // tiles, layer after layer
  const float *qkv_bias, *o_bias, *gate_up_bias, *down_bias;  // [layers][rows], or null
  const u16* embedding;                                       // bf16 [V][E]
  const float *attn_norm, *post_attn_norm, *mlp_norm, *post_mlp_norm, *final_norm, *q_norm, *k_norm,
      *key_shift;                // [layers][KV heads][HEAD_DIM], or null
  const float *cosines, *sines;  // [global, sliding][positions][ROTARY / 2]
  u16 *keys, *values;            // bf16 [layer][page][KV head][PAGE][PADDED]
  const int* pages;              // page table of the sequence
  u64 *qkv_words, *square_words, *part_words, *weight_words, *attention_words, *out_words, *feed_words, *down_words,
      *best_words;  // the exchange; of the last two and `out`, all ranks' one behind another
  u64 *out_peers[RANKS], *down_peers[RANKS], *best_peers[RANKS];  // this rank's words of those, in every rank's memory
  int* state;                                                     // token, position, epoch
  int* tokens;                                                    // [position + 1] is chosen here
  float* logits;                                                  // [V], or null
  int* trace;                                                     // clock marks [block][layer][16], with TRACE
  int pages_held, positions;
};
