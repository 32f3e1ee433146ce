// FLEXJUDGE_CLONES: one build of a function per instruction set, chosen when the library is loaded.
#pragma once

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)  // they start after the choice is made
#define FLEXJUDGE_CLONES
#elif defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FLEXJUDGE_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FLEXJUDGE_CLONES
#endif
