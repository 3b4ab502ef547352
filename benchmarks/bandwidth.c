/* How fast memory is read: bandwidth BYTES ROUNDS prints bytes read per second and per CPU second, best of the rounds. OpenMP's threads read a part each. */
#define _POSIX_C_SOURCE 200809L
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static double seconds(clockid_t clock) {
    struct timespec now;
    clock_gettime(clock, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

int main(int argc, char **argv) {
    size_t count = argc > 2 ? strtoull(argv[1], NULL, 10) / 64 : 0;
    int rounds = argc > 2 ? atoi(argv[2]) : 0;
    uint64_t(*block)[8] = malloc(count * 64 + 64);
    if (!count || !block) return 1;
    memset(block, 1, count * 64);
    double best = 0, best_cpu = 0;
    volatile uint64_t sink = 0;
    for (int round = 0; round < rounds; round++) {
        double start = seconds(CLOCK_MONOTONIC), cpu = seconds(CLOCK_PROCESS_CPUTIME_ID);
        uint64_t sum = 0;
#pragma omp parallel for reduction(+ : sum) schedule(static)
        for (size_t i = 0; i < count; i++)
            for (int k = 0; k < 8; k++) sum += block[i][k];
        sink += sum;
        double wall = (double)count * 64 / (seconds(CLOCK_MONOTONIC) - start), used = (double)count * 64 / (seconds(CLOCK_PROCESS_CPUTIME_ID) - cpu);
        best = wall > best ? wall : best;
        best_cpu = used > best_cpu ? used : best_cpu;
    }
    printf("%.0f %.0f\n", best, best_cpu);
    return 0;
}
