// Each case uses AMX as a processor would not allow; the emulator must end the process and say why.
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

int amx_install(void);

typedef struct {
  uint8_t palette, start, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
} Config;

static uint8_t memory[1024];

static Config usual(void) {
  Config config = {.palette = 1};
  for (int i = 0; i < 8; ++i) config.bytes[i] = 64, config.rows[i] = 16;
  return config;
}

// GCC takes it that only the first bytes of a configuration are read.
static void load(const Config* config) {
  asm volatile("" ::"r"(config) : "memory");
  _tile_loadconfig(config);
}

int main(int count, char** names) {
  if (count != 2 || amx_install() != 0) return 2;
  const char* name = names[1];
  Config config = usual();
  if (strcmp(name, "unconfigured") == 0) {
    _tile_zero(0);
  } else if (strcmp(name, "released") == 0) {
    load(&config);
    _tile_release();
    _tile_loadd(0, memory, 64);
  } else if (strcmp(name, "missing") == 0) {
    config.rows[3] = 0, config.bytes[3] = 0;
    load(&config);
    _tile_loadd(3, memory, 64);
  } else if (strcmp(name, "palette") == 0) {
    config.palette = 2;
    load(&config);
  } else if (strcmp(name, "wide") == 0) {
    config.bytes[0] = 65;
    load(&config);
  } else if (strcmp(name, "reserved") == 0) {
    config.reserved[3] = 1;
    load(&config);
  } else if (strcmp(name, "half") == 0) {
    config.rows[5] = 0;
    load(&config);
  } else if (strcmp(name, "twice") == 0) {
    load(&config);
    asm volatile(".byte 0xc4, 0xe2, 0x73, 0x5e, 0xc1");  // tdpbssd tmm0, tmm1, tmm1: no assembler takes it
  } else if (strcmp(name, "rows") == 0) {
    config.rows[1] = 8;
    load(&config);
    _tile_dpbusd(0, 1, 2);
  } else if (strcmp(name, "inner") == 0) {
    config.rows[2] = 8;
    load(&config);
    _tile_dpbsud(0, 1, 2);
  } else if (strcmp(name, "columns") == 0) {
    config.bytes[2] = 32;
    load(&config);
    _tile_dpbuud(0, 1, 2);
  } else if (strcmp(name, "other") == 0) {
    __builtin_trap();  // ud2: no AMX instruction
  } else if (strcmp(name, "right") == 0) {
    load(&config);
    _tile_loadd(7, memory, 64);
    Config found;
    memset(&found, 255, sizeof found);
    _tile_storeconfig(&found);
    _tile_release();
    return memcmp(&found, &config, sizeof found) == 0 ? 0 : 3;
  }
  return 4;
}
