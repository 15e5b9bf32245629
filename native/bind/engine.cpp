#include "bind.h"

namespace hasten {

void bind_engine(nb::module_&) {}

}  // namespace hasten
