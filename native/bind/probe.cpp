#include "bind.h"

namespace hasten {

void bind_probe(nb::module_&) {}

}  // namespace hasten
