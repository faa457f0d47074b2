// Typed access to the JSON of a bundle.
#ifndef KBITC_RUNNER_TABLE_H_
#define KBITC_RUNNER_TABLE_H_

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/extra/json.h>

#include <string>

#include "array.h"

namespace kbitc {

namespace json = tvm::ffi::json;

// Typed access to parsed JSON; a wrong type is a refused bundle.
class Table {
 public:
  Table(const tvm::ffi::Any& value, const std::string& where) : where_(where) {
    auto table = value.as<json::Object>();
    if (!table.has_value()) Wrong("a table is missing");
    table_ = *table;
  }
  std::string Text(const char* key) const {
    auto text = Get(key).as<tvm::ffi::String>();
    if (!text.has_value()) Wrong(std::string(key) + " is not a text");
    return std::string(text->data(), text->size());
  }
  int64_t Number(const char* key) const { return Integer(Get(key), key); }
  json::Array Items(const char* key) const {
    auto items = Get(key).as<json::Array>();
    if (!items.has_value()) Wrong(std::string(key) + " is not a list");
    return *items;
  }
  Table Sub(const char* key) const { return Table(Get(key), where_); }
  const DataType* Type() const {
    const DataType* type = FindDataType(Text("dtype"));
    if (type == nullptr) Wrong("unknown dtype");
    return type;
  }
  int64_t Integer(const tvm::ffi::Any& value, const std::string& what) const {
    auto number = value.as<int64_t>();
    if (!number.has_value() || value.as<bool>().has_value() || *number < 0) Wrong(what + " is not a number");
    return *number;
  }
  const json::Object& items() const { return table_; }
  [[noreturn]] void Wrong(const std::string& what) const {
    throw Failure(kBundle, "manifest.json: " + what + " [at " + where_ + "]");
  }

 private:
  tvm::ffi::Any Get(const char* key) const {
    auto found = table_.find(tvm::ffi::String(key));
    if (found == table_.end()) Wrong(std::string(key) + " is missing");
    return (*found).second;
  }
  json::Object table_;
  std::string where_;
};

}  // namespace kbitc
#endif  // KBITC_RUNNER_TABLE_H_
