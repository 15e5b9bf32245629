#include "bind.h"

namespace hasten {

void bind_pack(nb::module_&) {}

}  // namespace hasten
