#include "bind.h"

namespace hasten {

void bind_sampler(nb::module_&) {}

}  // namespace hasten
