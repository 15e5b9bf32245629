#include "bind.h"

namespace hasten {

void bind_divergence(nb::module_&) {}

}  // namespace hasten
