// Runs AMX-TILE and AMX-INT8 instructions on x86-64 processors without them, for tests.
//
// `amx_install` takes over SIGILL: an AMX instruction is decoded where it stopped, carried out on tiles of the thread,
// and skipped. What a processor would fault on or leave undefined ends the process with a message. Every SIGILL that is
// of no AMX instruction ends the process as before. Reference: Intel SDM, volume 2 (TILELOADD, TDPBSSD ...), volume 1
// chapter 18; palette 1 has 8 tiles of 16 rows of 64 bytes.
#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

enum { TILES = 8, ROWS = 16, ROW_BYTES = 64, KINDS = 7 };
// Counted: configure, release, zero, load, store, dot, store of a configuration.
enum { CONFIGURE, RELEASE, ZERO, LOAD, STORE, DOT, STORE_CONFIG };

typedef struct {
  int configured;
  uint8_t rows[TILES];
  uint16_t bytes[TILES];
  uint8_t data[TILES][ROWS][ROW_BYTES];
} Tiles;

static __thread Tiles* own __attribute__((tls_model("initial-exec")));
static int configured_threads;
static uint64_t counts[KINDS];

static void fail(const char* what) {
  static const char head[] = "amx emulator: ";
  ssize_t ignored = write(2, head, sizeof head - 1);
  ignored = write(2, what, strlen(what));
  ignored = write(2, "\n", 1);
  (void)ignored;
  abort();
}

static Tiles* tiles(void) {
  if (own == NULL) {
    void* made = mmap(NULL, sizeof(Tiles), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (made == MAP_FAILED) fail("no memory for the tiles of a thread");
    own = made;
  }
  return own;
}

static void count(int kind) { __atomic_add_fetch(&counts[kind], 1, __ATOMIC_RELAXED); }

// One decoded instruction.
typedef struct {
  int prefix, opcode, reg, rm, second, is_register, has_sib;
  uint8_t* address;
  uint64_t stride;
  uint8_t* end;
} Instruction;

static uint64_t general(const ucontext_t* context, int number) {
  static const int places[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                 REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  return (uint64_t)context->uc_mcontext.gregs[places[number]];
}

// Whether the bytes are an AMX instruction: VEX of three bytes, map 0F38, W0, 128 bits, opcodes 49, 4B, 5E.
static int decode(const ucontext_t* context, Instruction* found) {
  uint8_t* at = (uint8_t*)context->uc_mcontext.gregs[REG_RIP];
  if (at[0] != 0xC4 || (at[1] & 0x1F) != 2 || (at[2] & 0x84) != 0) return 0;
  int high_x = at[1] & 0x40 ? 0 : 8, high_b = at[1] & 0x20 ? 0 : 8;
  memset(found, 0, sizeof *found);
  found->prefix = at[2] & 3;  // 0: none, 1: 66, 2: F3, 3: F2
  found->second = ~at[2] >> 3 & 15;
  found->opcode = at[3];
  if (found->opcode != 0x49 && found->opcode != 0x4B && found->opcode != 0x5E) return 0;
  uint8_t modrm = at[4];
  int mode = modrm >> 6;
  found->reg = (modrm >> 3 & 7) | (at[1] & 0x80 ? 0 : 8);
  found->rm = modrm & 7;
  at += 5;
  found->is_register = mode == 3;
  if (mode != 3) {
    uint64_t address = 0;
    int base = found->rm, wide = mode == 2;
    if (found->rm == 4) {
      uint8_t sib = *at++;
      int index = (sib >> 3 & 7) | high_x;
      found->has_sib = 1;
      base = sib & 7;
      found->stride = index == 4 ? 0 : general(context, index) << (sib >> 6);
      if (base == 5 && mode == 0) wide = 1;
      else address = general(context, base | high_b);
    } else if (found->rm == 5 && mode == 0) {
      int32_t distance;
      memcpy(&distance, at, sizeof distance);
      at += sizeof distance;
      found->address = at + distance;
      found->end = at;
      return 1;
    } else {
      address = general(context, base | high_b);
    }
    if (wide) {
      int32_t distance;
      memcpy(&distance, at, sizeof distance);
      at += sizeof distance;
      address += (int64_t)distance;
    } else if (mode == 1) {
      address += (int64_t)(int8_t)*at++;
    }
    found->address = (uint8_t*)address;
  }
  found->end = at;
  return 1;
}

static void set_configured(Tiles* all, int value) {
  if (value != all->configured) __atomic_add_fetch(&configured_threads, value ? 1 : -1, __ATOMIC_RELAXED);
  all->configured = value;
  memset(all->data, 0, sizeof all->data);
}

static void configure(Tiles* all, const uint8_t* from) {
  if (from[0] > 1) fail("ldtilecfg of an unknown palette");
  for (int i = 2; i < 16; ++i) {
    if (from[i] != 0) fail("ldtilecfg with reserved bytes that are not zero");
  }
  for (int i = 16 + 2 * TILES; i < 48; ++i) {
    if (from[i] != 0) fail("ldtilecfg of more than 8 tiles");
  }
  for (int i = 48 + TILES; i < 64; ++i) {
    if (from[i] != 0) fail("ldtilecfg of more than 8 tiles");
  }
  for (int i = 0; i < TILES; ++i) {
    uint16_t bytes = (uint16_t)(from[16 + 2 * i] | from[17 + 2 * i] << 8);
    uint8_t rows = from[48 + i];
    if (bytes > ROW_BYTES || rows > ROWS) fail("ldtilecfg of a tile with more than 16 rows or 64 bytes a row");
    if ((bytes == 0) != (rows == 0)) fail("ldtilecfg of a tile with rows but no bytes, or bytes but no rows");
    all->bytes[i] = bytes;
    all->rows[i] = rows;
  }
  set_configured(all, from[0] == 1);
}

static void store_config(const Tiles* all, uint8_t* to) {
  memset(to, 0, 64);
  if (!all->configured) return;
  to[0] = 1;
  for (int i = 0; i < TILES; ++i) {
    to[16 + 2 * i] = (uint8_t)all->bytes[i];
    to[17 + 2 * i] = (uint8_t)(all->bytes[i] >> 8);
    to[48 + i] = all->rows[i];
  }
}

static int usable(const Tiles* all, int tile) {
  if (!all->configured) fail("a tile instruction without a configuration");
  if (tile >= TILES || all->rows[tile] == 0) fail("a tile that the configuration does not have");
  return tile;
}

static void dot(Tiles* all, int to, int left, int right, int left_signed, int right_signed) {
  usable(all, to), usable(all, left), usable(all, right);
  if (to == left || to == right || left == right) fail("tdpb with the same tile twice");
  if (all->rows[to] != all->rows[left]) fail("tdpb: rows of the sums are not those of the left tile");
  if (all->bytes[to] != all->bytes[right]) fail("tdpb: columns of the sums are not those of the right tile");
  if (all->bytes[left] % 4 || all->bytes[to] % 4) fail("tdpb: rows that are no whole dwords");
  if (all->bytes[left] / 4 != all->rows[right]) fail("tdpb: columns of the left tile are not rows of the right one");
  for (int m = 0; m < all->rows[to]; ++m) {
    for (int n = 0; n < all->bytes[to] / 4; ++n) {
      uint32_t sum;
      memcpy(&sum, &all->data[to][m][4 * n], sizeof sum);
      for (int k = 0; k < all->bytes[left]; ++k) {
        int a = all->data[left][m][k], b = all->data[right][k / 4][4 * n + k % 4];
        if (left_signed) a = (int8_t)a;
        if (right_signed) b = (int8_t)b;
        sum += (uint32_t)(a * b);
      }
      memcpy(&all->data[to][m][4 * n], &sum, sizeof sum);
    }
  }
}

static void move_rows(Tiles* all, const Instruction* what, int store) {
  int tile = usable(all, what->reg);
  if (!what->has_sib) fail("tileloadd or tilestored without a scaled index");
  for (int row = 0; row < all->rows[tile]; ++row) {
    uint8_t* place = what->address + row * what->stride;
    if (store) memcpy(place, all->data[tile][row], all->bytes[tile]);
    else memcpy(all->data[tile][row], place, all->bytes[tile]);
  }
}

static int execute(const Instruction* what) {
  Tiles* all = tiles();
  if (what->opcode == 0x5E) {
    if (!what->is_register) return 0;
    // 66: unsigned by signed, F3: signed by unsigned, F2: both signed.
    dot(all, what->reg, what->rm, what->second, what->prefix >= 2, what->prefix == 1 || what->prefix == 3);
    count(DOT);
  } else if (what->second != 0) {
    fail("an instruction whose VEX.vvvv must be 1111");
  } else if (what->opcode == 0x4B) {
    if (what->is_register || what->prefix == 0) return 0;
    move_rows(all, what, what->prefix == 2);
    count(what->prefix == 2 ? STORE : LOAD);
  } else if (what->is_register && what->prefix == 3) {
    memset(all->data[usable(all, what->reg)], 0, sizeof all->data[0]);
    count(ZERO);
  } else if (what->is_register && what->prefix == 0 && what->reg == 0 && what->rm == 0) {
    set_configured(all, 0);
    count(RELEASE);
  } else if (!what->is_register && what->prefix == 0 && what->reg == 0) {
    configure(all, what->address);
    count(CONFIGURE);
  } else if (!what->is_register && what->prefix == 1 && what->reg == 0) {
    store_config(all, what->address);
    count(STORE_CONFIG);
  } else {
    return 0;
  }
  return 1;
}

static void handle(int number, siginfo_t* info, void* raw) {
  ucontext_t* context = raw;
  Instruction what;
  (void)info;
  if (decode(context, &what) && execute(&what)) {
    context->uc_mcontext.gregs[REG_RIP] = (greg_t)what.end;
    return;
  }
  signal(number, SIG_DFL);  // the instruction runs again and ends the process
}

// Take over SIGILL; once is enough. 0 on success.
int amx_install(void) {
  struct sigaction action;
  memset(&action, 0, sizeof action);
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigemptyset(&action.sa_mask);
  return sigaction(SIGILL, &action, NULL);
}

// A program that is not Python preloads this library and sets AMX_EMULATOR.
__attribute__((constructor)) static void at_start(void) {
  if (getenv("AMX_EMULATOR") != NULL && amx_install() != 0) fail("SIGILL cannot be handled");
}

// Threads whose tiles are configured now.
int amx_configured_threads(void) { return __atomic_load_n(&configured_threads, __ATOMIC_RELAXED); }

// Instructions so far by kind: configure, release, zero, load, store, dot, store of a configuration.
void amx_counts(uint64_t* into) {
  for (int i = 0; i < KINDS; ++i) into[i] = __atomic_load_n(&counts[i], __ATOMIC_RELAXED);
}
