/*
 * Gives assets/llama2c/run.c damaged files and odd prompts, one after the other in one process: fuzz COUNT SEED FOLDER...
 *
 * A FOLDER holds a bundle's model.bin, tokenizer.bin and runtime.cfg. Built with -fsanitize=address,undefined; a file is memory of exactly its size, so that a
 * read past its end shows. Prints what became of the inputs and ends with 1 where one crashed or took longer than LONGEST seconds; such an input comes back
 * by `fuzz 1 NUMBER FOLDER...`.
 */
#define _POSIX_C_SOURCE 200809L
#define _DEFAULT_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define INPUTS 250 /* of a child, which leaves its memory to its end */
#define LONGEST 20
enum { MODEL, TOKENIZER, RUNTIME, FILES };
static const char *const NAMES[FILES] = {"model.bin", "tokenizer.bin", "runtime.cfg"};

typedef struct {
    unsigned char *at;
    size_t size;
} Blob;

static Blob now[FILES], input;
static size_t input_at;
static jmp_buf ended;
static FILE *nowhere;

/* ---- what run.c is given in place of the system's ---- */

static int fuzz_open(const char *path) {
    for (int i = 0; i < FILES; i++)
        if (strstr(path, NAMES[i])) return 100 + i;
    errno = ENOENT;
    return -1;
}
static int fuzz_fstat(int fd, struct stat *info) {
    info->st_mode = S_IFREG;
    info->st_size = (off_t)now[fd - 100].size;
    return 0;
}
static void *fuzz_mmap(size_t size, int fd) {
    void *block = malloc(size);
    memcpy(block, now[fd - 100].at, size);
    return block;
}
static int fuzz_getchar(void) { return input_at < input.size ? input.at[input_at++] : EOF; }
__attribute__((noreturn)) static void fuzz_exit(int code) { longjmp(ended, code + 1); }

#define open(path, flags) fuzz_open(path)
#define fstat(fd, info) fuzz_fstat(fd, info)
#define mmap(at, size, protection, flags, fd, offset) fuzz_mmap(size, fd)
#define munmap(at, size) free(at)
#define close(fd) ((void)(fd))
#define access(path, mode) 0
#define isatty(fd) 0
#define getchar fuzz_getchar
#define exit fuzz_exit
#undef stderr
#undef stdout
#define stderr nowhere
#define stdout nowhere
#define main run_main
#include "run.c"
#undef main
#undef open
#undef mmap
#undef close
#undef exit

/* ---- inputs ---- */

static uint64_t state;

static uint64_t next(void) { /* splitmix64 */
    uint64_t z = state += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}
static size_t below(size_t count) { return count ? next() % count : 0; }

static int32_t odd_number(void) {
    static const int32_t odd[] = {0, 1, -1, 2, 3, 4, 5, 7, 8, 16, 31, 32, 63, 64, 65, 127, 128, 255, 256, 1 << 16, 1 << 20, 1 << 24, 1 << 30, INT32_MAX, INT32_MIN,
                                  0x7F800000, 0x7FC00000, (int32_t)0xFF800000, 0x616b3432};
    return below(3) ? odd[below(sizeof odd / sizeof *odd)] : (int32_t)next();
}

static void replace(Blob *file, size_t at, size_t size, const void *with, size_t count) {
    unsigned char *made = malloc(file->size - size + count + 1);
    memcpy(made, file->at, at);
    memcpy(made + at, with, count);
    memcpy(made + at + count, file->at + at + size, file->size - at - size);
    free(file->at);
    *file = (Blob){made, file->size - size + count};
}

static void damage_bytes(Blob *file, size_t reach) {
    size_t at = below(file->size < reach ? file->size : reach), left = file->size - at, size = below(left < 40 ? left : 40);
    int32_t number = odd_number();
    unsigned char some[40];
    for (int i = 0; i < 40; i++) some[i] = (unsigned char)next();
    if (file->size == 0) return;
    switch (below(8)) {
        case 0: file->at[at] ^= (unsigned char)(1u << below(8)); break;
        case 1: file->at[at] = (unsigned char)next(); break;
        case 2: file->size = at; break;
        case 3: replace(file, at, size, some, 0); break;
        case 4: replace(file, at, 0, some, below(40)); break;
        case 5: replace(file, at + size, 0, memcpy(some, file->at + at, size), size); break;
        default:
            at -= at % 4;
            if (file->size - at >= 4) memcpy(file->at + at, &number, 4);
    }
}

/* A number, a word or a line of a text file becomes another. */
static void damage_text(Blob *file) {
    static const char *const odd[] = {"", " ", "\n", "-1", "0", "1", "99999999999999999999", "4294967296", "2147483647", "-", "\\", "\\x", "\\x0", "end\n", "=", "+", ".",
                                      "merge 0 0 0\n", "merges 1\n", "special 0 1 <\n", "nan", "inf", "1e39", "ffffffff", "d800", "10ffff"};
    size_t at = below(file->size), end = at;
    if (file->size == 0) return;
    size_t from = at;
    while (from > 0 && file->at[from - 1] != '\n' && file->at[from - 1] != ' ') from--;
    while (end < file->size && file->at[end] != '\n' && file->at[end] != ' ') end++;
    const char *with = odd[below(sizeof odd / sizeof *odd)];
    if (below(4) == 0) damage_bytes(file, SIZE_MAX);
    else if (below(4) == 0) {
        while (from > 0 && file->at[from - 1] != '\n') from--;
        while (end < file->size && file->at[end] != '\n') end++;
        end += end < file->size;
        size_t size = end - from;
        unsigned char *line = malloc(size + 1);
        memcpy(line, file->at + from, size);
        if (below(2)) replace(file, from, 0, line, size); /* twice */
        else replace(file, from, size, "", 0);
        free(line);
    } else replace(file, from, end - from, with, strlen(with));
}

static char *odd_text(size_t most) {
    static const char *const parts[] = {"Once upon", " a", "  ", "\n", "\r\n", "\t", "12", "3456", "'s", "'LL", "\xc3\xa9", "e\xcc\x81", "\xec\x95\x88", "\xe1\x84\x80\xe1\x85\xa1",
                                        "\xe4\xbd\xa0", "\xf0\x9f\x99\x82", "\xe2\x96\x81", "\xc2\xa0", "\xff", "\xe4\xb8", "\xf0\x9f", "<s>", "<|im_end|>", "<|im_", "<0x0A>", "!",
                                        "\xcc\x81\xcc\xa7", "\\n", "\\", "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"};
    Text text = {0};
    for (size_t n = below(most); n--;) {
        const char *part = parts[below(sizeof parts / sizeof *parts)];
        if (below(8) == 0) append(&text, &(char){(char)(1 + below(255))}, 1);
        else append(&text, part, strlen(part));
    }
    append(&text, "", 1);
    return text.at;
}

/* 0 where the program ran to its end, 1 where it refused. */
static int try_one(uint64_t seed, Blob (*bundles)[FILES], size_t count) {
    state = seed * 0x2545F4914F6CDD1Du + 1;
    Blob *from = bundles[below(count)];
    for (int i = 0; i < FILES; i++) {
        now[i] = (Blob){malloc(from[i].size + 1), from[i].size};
        memcpy(now[i].at, from[i].at, from[i].size);
    }
    size_t file = below(4); /* FILES: none, only the prompt is odd */
    for (size_t n = 1 + below(3); file < FILES && n--;) {
        if (file == RUNTIME) damage_text(&now[file]);
        else damage_bytes(&now[file], file == MODEL && below(3) ? 72 : SIZE_MAX);
    }
    input.at = (unsigned char *)odd_text(12);
    input.size = strlen((char *)input.at);
    input_at = 0;
    char count_text[12], *argv[16] = {"run", "model.bin", "-n", count_text, "-s", "7", "-t", below(2) ? "0" : "1.5", "-i", odd_text(below(20) ? 12 : 150)};
    int argc = 10;
    snprintf(count_text, sizeof count_text, "%d", (int)below(14) + 1);
    if (below(3) == 0) argv[argc++] = "-m", argv[argc++] = "chat";
    if (argc > 10 && below(2)) argv[argc++] = "-y", argv[argc++] = odd_text(5);
    if (below(4) == 0) argv[argc++] = below(2) ? "--ids" : "--answer-ids";
    int code = setjmp(ended);
    return code ? code - 1 : run_main(argc, argv);
}

static Blob read_file(const char *folder, const char *name) {
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *file = fopen(path, "rb");
    if (!file) perror(path), _exit(2);
    Blob made = {malloc(1 << 24), 0};
    made.size = fread(made.at, 1, 1 << 24, file);
    fclose(file);
    made.at = realloc(made.at, made.size + 1);
    return made;
}

int main(int argc, char **argv) {
    if (argc < 4) return 2;
    const size_t count = strtoull(argv[1], NULL, 10), bundles = (size_t)argc - 3;
    const uint64_t seed = strtoull(argv[2], NULL, 10);
    Blob(*files)[FILES] = malloc(bundles * sizeof *files);
    for (size_t b = 0; b < bundles; b++)
        for (int i = 0; i < FILES; i++) files[b][i] = read_file(argv[3 + b], NAMES[i]);
    nowhere = fopen("/dev/null", "w");
    struct {
        size_t at, ended[2];
    } *shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    size_t faults = 0;
    FILE *told = fdopen(dup(1), "w");
    while (shared->at < count) {
        pid_t child = fork();
        if (child == 0) {
            dup2(open("/dev/null", O_WRONLY), 1);
            for (size_t end = shared->at + INPUTS; shared->at < count && shared->at < end; shared->at++) {
                alarm(LONGEST);
                shared->ended[try_one(seed + shared->at, files, bundles) != 0]++;
            }
            _exit(0);
        }
        int status = 0;
        waitpid(child, &status, 0);
        if (status == 0) continue;
        faults++;
        fprintf(told, "input %llu: %s\n", (unsigned long long)(seed + shared->at), WIFSIGNALED(status) && WTERMSIG(status) == SIGALRM ? "takes too long" : "crashes");
        fflush(told);
        shared->at++;
    }
    fprintf(told, "%zu inputs: %zu ran, %zu refused, %zu faults\n", count, shared->ended[0], shared->ended[1], faults);
    fclose(told);
    return faults != 0;
}
