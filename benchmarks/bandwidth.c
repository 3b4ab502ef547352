/* How fast a file in memory is read: bandwidth FILE ROUNDS prints bytes per second and per CPU second, best of the rounds. OpenMP's threads read a part each. */
#define _POSIX_C_SOURCE 200809L
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>

static double seconds(clockid_t clock) {
    struct timespec now;
    clock_gettime(clock, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

int main(int argc, char **argv) {
    struct stat info;
    int file = argc > 2 ? open(argv[1], O_RDONLY) : -1, rounds = argc > 2 ? atoi(argv[2]) : 0;
    if (file < 0 || fstat(file, &info) != 0) return 1;
    const size_t count = (size_t)info.st_size / 64;
    const uint64_t(*block)[8] = mmap(NULL, (size_t)info.st_size, PROT_READ, MAP_SHARED, file, 0);
    if (block == MAP_FAILED) return 1;
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
