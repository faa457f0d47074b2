// What a kernel compiled for the emulator shares with the emulator: the thread it runs as and its meeting points.
#pragma once

struct kb_index { unsigned x, y, z; };
struct kb_words { unsigned w[4]; };

extern "C" {
extern kb_index kb_thread, kb_block, kb_block_size, kb_grid_size;
// Wait for every thread of the block.
void kb_sync_block(void);
// Give four words, wait for the other threads of the warp, and return the table of what the 32 lanes gave.
const kb_words* kb_sync_warp(int kind, kb_words given);
unsigned kb_lane(void);
}
