// Included before every source by `make wheel`, so that a library built with a new glibc and libstdc++ loads with the
// old ones of its tag. Three things of the new ones are in the code; for each there is an older one that does the same.
#pragma once

// From glibc 2.32 on it tells std::shared_ptr that a process has one thread, whose counts need no atomics. Zero: it may
// have more.
extern "C" {
__attribute__((weak, visibility("hidden"))) char __libc_single_threaded = 0;
}

#if defined(__x86_64__)
// Of 2.29 and later, which does not set errno by the rules of System V: the values are the same.
__asm__(".symver pow, pow@GLIBC_2.2.5");
#endif

// std::condition_variable::wait as it was before GCC 12 made it noexcept.
__asm__(
    ".symver _ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE, "
    "_ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE@GLIBCXX_3.4.11");
