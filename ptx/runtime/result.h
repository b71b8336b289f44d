// The last launch's result as JSON.
#pragma once
#include <string>

namespace ptx {

std::string result_json();

}  // namespace ptx
