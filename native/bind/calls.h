// What holds for every call from Python: who waits for the interpreter lock, and who may use an object now.
#pragma once

#include <nanobind/nanobind.h>

#include <atomic>
#include <chrono>
#include <stdexcept>
#include <thread>

namespace hasten {

// Lets other Python threads run while native code works, as nanobind's gil_scoped_release.
//
// Up to CPython 3.13, a thread that asks for the lock while Python ends is ended by pthread_exit, which unwinds its
// stack. C++ frames that may not be unwound then abort the process ("FATAL: exception not rethrown"). Here such a
// thread stops for good, as all do from CPython 3.14 on; the process ends without it.
class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() {
    try {
      PyEval_RestoreThread(state_);
    } catch (...) {  // nothing else than pthread_exit
      for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
    }
  }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* state_;
};

// Two threads are inside one object at the same time; becomes hasten.errors.UsageError (module.cpp).
struct BusyError : std::runtime_error {
  BusyError(const char* what, const char* next) : std::runtime_error(what), hint(next) {}
  const char* hint;
};

// The right to use an object that is not for several threads. Nobody waits for it: a second caller is told at once.
class Turn {
 public:
  Turn(std::atomic_flag& busy, const char* what, const char* hint) : busy_(busy) {
    if (busy_.test_and_set(std::memory_order_acquire)) throw BusyError(what, hint);
  }
  ~Turn() { busy_.clear(std::memory_order_release); }
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;

 private:
  std::atomic_flag& busy_;
};

}  // namespace hasten
