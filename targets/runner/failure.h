// One-line failures with the exit codes of kbitc: 2 usage, 5 inputs, 7 input/output, 8 refused bundle.
#ifndef KBITC_RUNNER_FAILURE_H_
#define KBITC_RUNNER_FAILURE_H_

#include <stdexcept>
#include <string>

namespace kbitc {

enum ExitCode { kInternal = 1, kUsage = 2, kInputs = 5, kResource = 7, kBundle = 8 };

struct Failure : std::runtime_error {
  Failure(ExitCode exit_code, const std::string& message) : std::runtime_error(message), code(exit_code) {}
  ExitCode code;
};

}  // namespace kbitc
#endif  // KBITC_RUNNER_FAILURE_H_
