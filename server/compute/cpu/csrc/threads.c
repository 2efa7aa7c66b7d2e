// Where the threads of a team run.

#define _GNU_SOURCE

#include <omp.h>
#include <sched.h>
#include <stdint.h>

// Binds the calling thread and the rest of its team to one CPU each: thread i to cpus[i]. Returns how many could not be.
int bind_threads(const int32_t *cpus, int threads) {
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(+ : failed)
    {
        cpu_set_t one;
        CPU_ZERO(&one);
        CPU_SET(cpus[omp_get_thread_num()], &one);
        failed += sched_setaffinity(0, sizeof(one), &one) != 0;
    }
    return failed;
}
