/*
 * Runs a Llama, Mistral, Qwen2 or Qwen3 model from the files of karpathy/llama2.c: model.bin (version 0 or 1 in fp32, version 2
 * in int8, or Boardwalk's version 3 in fp32, int8 or int4) and tokenizer.bin. What those formats cannot say (rope base of versions
 * 0 to 2, stop ids, BPE merges, chat template) comes from runtime.cfg beside the model; without that file the program keeps to
 * llama2.c's conventions for Llama 2.
 *
 * Build: make          one core          Run: ./run model.bin -i "Once upon a time"
 *        make omp      all cores              ./run model.bin -m chat
 */
#define _POSIX_C_SOURCE 200809L
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#if defined __AVX2__
#include <immintrin.h>
#elif defined __ARM_FEATURE_DOTPROD
#include <arm_neon.h>
#endif

/* ---- memory, text, files ---- */

typedef struct {
    const char *at;
    size_t size;
} Str;

typedef struct {
    char *at;
    size_t size, room;
} Text;

typedef struct {
    int *at;
    size_t size, room;
} Ids;

__attribute__((noreturn, format(printf, 1, 2))) static void die(const char *format, ...) {
    va_list args;
    va_start(args, format);
    fflush(stdout);
    fputs("run: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    exit(1);
}

static void *resize(void *old, size_t count, size_t each) {
    if (each && count > SIZE_MAX / 2 / each) die("out of memory: %zu x %zu bytes", count, each);
    void *now = realloc(old, count * each + 1);
    if (!now) die("out of memory: %zu bytes", count * each);
    return now;
}

static void *zeros(size_t count, size_t each) {
    void *block = resize(NULL, count, each);
    memset(block, 0, count * each);
    return block;
}

static void append(Text *text, const char *bytes, size_t size) {
    if (text->size + size > text->room) {
        text->room = 2 * (text->size + size) + 64;
        text->at = resize(text->at, text->room, 1);
    }
    if (size) memcpy(text->at + text->size, bytes, size);
    text->size += size;
}

static void push(Ids *ids, int id) {
    if (ids->size == ids->room) {
        ids->room = 2 * ids->room + 16;
        ids->at = resize(ids->at, ids->room, sizeof(int));
    }
    ids->at[ids->size++] = id;
}

static Str text_of(const char *c_string) { return (Str){c_string, strlen(c_string)}; }

static bool same(Str a, Str b) { return a.size == b.size && (a.size == 0 || memcmp(a.at, b.at, a.size) == 0); }

/* Maps a whole file read-only. NULL with errno set where it cannot be opened; dies where it is empty or not a file. */
static const unsigned char *map_file(const char *path, size_t *size) {
    int fd = open(path, O_RDONLY);
    if (fd < 0) return NULL;
    struct stat info;
    if (fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) die("%s is not a file", path);
    if (info.st_size == 0) die("%s is empty", path);
    *size = (size_t)info.st_size;
    void *block = mmap(NULL, *size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (block == MAP_FAILED) die("cannot map %s: %s", path, strerror(errno));
    close(fd);
    return block;
}

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* ---- the model ---- */

/* Vectors of 32 bytes: the compiler makes of them what the machine has. */
typedef float Floats __attribute__((vector_size(32)));
typedef int32_t Ints __attribute__((vector_size(32)));
typedef int8_t Bytes __attribute__((vector_size(32)));
typedef uint8_t Halves __attribute__((vector_size(32)));

enum { WQ, WK, WV, WO, W1, W2, W3, MATRICES };

/* rows x cols, row by row: fp32 in `f` (bits 32), or integers in `q` with one fp32 scale per `group` of them in `scale`. int8 (bits 8) are
 * bytes; int4 (bits 4) are 64 in 32 bytes, value i less 8 in the low and value i + 32 in the high half of byte i. */
typedef struct {
    int rows, cols, bits, group;
    const float *f, *scale, *bias; /* bias: (rows), or NULL */
    const int8_t *q;
} Matrix;

typedef struct {
    const float *attention_norm, *ffn_norm, *q_norm, *k_norm; /* the last two: (head_dim), or NULL */
    Matrix w[MATRICES];
    float *keys, *values; /* (room, kv_dim) */
} Layer;

/* Prompt tokens that are read in one pass over the weights. */
#define BATCH 32

typedef struct {
    int version, dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len; /* the header, in the file's order */
    int head_dim, q_dim, kv_dim, group;                                               /* group: 0 where computed in fp32 */
    float rope_theta, rope_scale, norm_eps;
    const float *frequency; /* (head_dim / 2), radians per position; NULL: of rope_theta */
    Matrix embedding, classifier;
    const float *final_norm;
    Layer *layers;
    int room;                              /* positions the caches hold now */
    float *x, *xb, *hb, *hb2, *q, *rope;   /* of BATCH tokens */
    float *attention, *logits;
    int8_t *xq; /* the input of the products, as integers */
    float *xq_scale;
    int32_t *xq_start; /* of each group of them, less 8 times their sum: what int4 values in the file, which are 8 too large, add too much */
} Model;

typedef struct {
    const char *path;
    const unsigned char *start, *at, *end;
} Cursor;

static const void *take(Cursor *c, uint64_t size) {
    if (size > (uint64_t)(c->end - c->at))
        die("%s is damaged or cut short: its header asks for more bytes than the file has", c->path);
    const void *block = c->at;
    c->at += size;
    return block;
}

static int32_t take_int(Cursor *c) {
    int32_t value;
    memcpy(&value, take(c, 4), 4);
    return value;
}

static float take_float(Cursor *c) {
    float value;
    memcpy(&value, take(c, 4), 4);
    return value;
}

/* Counts are bounded by check_shape, so that the products fit 64 bits. */
static const float *take_floats(Cursor *c, uint64_t count) { return take(c, 4 * count); }

/* Version 3 begins each tensor at a multiple of 64 bytes. */
static void align(const Model *m, Cursor *c) {
    if (m->version == 3) take(c, (uint64_t)(-(c->at - c->start) & 63));
}

static const float *take_vector(const Model *m, Cursor *c, int count) {
    align(m, c);
    return take_floats(c, (uint64_t)count);
}

/* Whether int8 rows in such groups fill vectors of 32 bytes. Others are widened to fp32 as they are read; with groups below 16 int8 would be slower than that. */
static bool fills_vectors(int group, int cols) { return group % 32 == 0 || (group == 16 && cols % 32 == 0); }

static Matrix take_matrix(const Model *m, Cursor *c, int bits, int rows, int cols) {
    uint64_t count = (uint64_t)rows * (uint64_t)cols;
    Matrix w = {.rows = rows, .cols = cols, .bits = bits, .group = m->group};
    align(m, c);
    if (bits == 32) {
        w.f = take_floats(c, count);
        return w;
    }
    if (count % 4) die("%s: %llu int8 values would leave their scales unaligned", c->path, (unsigned long long)count);
    w.q = take(c, bits == 4 ? count / 2 : count);
    w.scale = take_floats(c, count / (uint64_t)m->group);
    if (fills_vectors(m->group, cols)) return w;
    float *wide = resize(NULL, count, sizeof(float));
    for (uint64_t i = 0; i < count; i++) wide[i] = (float)w.q[i] * w.scale[i / (uint64_t)m->group];
    w.f = wide;
    w.bits = 32;
    return w;
}

static void check_shape(const Model *m, const char *path) {
    struct {
        const char *name;
        int value, most;
    } sizes[] = {{"dim", m->dim, 1 << 20},           {"hidden_dim", m->hidden_dim, 1 << 22}, {"n_layers", m->n_layers, 1 << 12},
                 {"n_heads", m->n_heads, 1 << 14},   {"n_kv_heads", m->n_kv_heads, 1 << 14}, {"vocab_size", m->vocab_size, 1 << 24},
                 {"seq_len", m->seq_len, 1 << 24},   {"head_dim", m->head_dim, 1 << 12}};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        if (sizes[i].value < 1 || sizes[i].value > sizes[i].most)
            die("%s is not a llama2.c model: %s is %d", path, sizes[i].name, sizes[i].value);
    if (m->n_heads % m->n_kv_heads || m->head_dim % 2 || (m->version < 3 && m->dim % m->n_heads))
        die("%s is not a llama2.c model: dim %d, %d heads of %d, %d kv heads", path, m->dim, m->n_heads, m->head_dim, m->n_kv_heads);
}

/* Integers of a row have whole groups, and where they are int4 whole blocks of 64 too. */
static void check_group(const Model *m, int bits, const char *path) {
    const int cols[] = {m->dim, m->hidden_dim, m->q_dim};
    for (int i = 0; i < 3; i++)
        if (m->group < 1 || cols[i] % m->group || (bits == 4 && (cols[i] % 64 || m->group % 32 || (m->group % 64 && m->group != 32))))
            die("%s: int%d in groups of %d do not divide rows of %d", path, bits, m->group, cols[i]);
}

/* What version 3 adds to a layer: biases of q, k, v (bit 0), of the output projection (1) and of the MLP (2). */
static const int BIAS_BIT[MATRICES] = {0, 0, 0, 1, 2, 2, 2};

static void load_layer_3(Model *m, Cursor *c, Layer *layer, int bits, int biases, bool qk_norm, const int *rows, const int *cols) {
    layer->attention_norm = take_vector(m, c, m->dim);
    layer->ffn_norm = take_vector(m, c, m->dim);
    if (qk_norm) {
        layer->q_norm = take_vector(m, c, m->head_dim);
        layer->k_norm = take_vector(m, c, m->head_dim);
    }
    for (int w = 0; w < MATRICES; w++) {
        layer->w[w] = take_matrix(m, c, bits, rows[w], cols[w]);
        if (biases >> BIAS_BIT[w] & 1) layer->w[w].bias = take_vector(m, c, rows[w]);
    }
}

static void load_model(Model *m, const char *path) {
    size_t size;
    const unsigned char *data = map_file(path, &size);
    if (!data) die("cannot open %s: %s", path, strerror(errno));
    Cursor c = {path, data, data, data + size};

    int *shape[] = {&m->dim, &m->hidden_dim, &m->n_layers, &m->n_heads, &m->n_kv_heads, &m->vocab_size, &m->seq_len};
    int bits = 32, biases = 0, qk_norm = 0;
    bool shared;
    if (size >= 8 && memcmp(data, "24ka", 4) == 0) { /* 0x616b3432, little endian */
        take_int(&c);
        m->version = take_int(&c);
        if (m->version < 1 || m->version > 3) die("%s has version %d; this program reads 0, 1, 2 and 3", path, m->version);
    }
    for (int i = 0; i < 7; i++) *shape[i] = take_int(&c);
    if (m->version == 0) {
        shared = m->vocab_size > 0;
        if (m->vocab_size < 0 && m->vocab_size != INT32_MIN) m->vocab_size = -m->vocab_size;
    } else {
        shared = m->version == 3 ? take_int(&c) != 0 : *(const uint8_t *)take(&c, 1) != 0;
        if (m->version == 2) bits = 8, m->group = take_int(&c);
        if (m->version == 3) {
            m->head_dim = take_int(&c);
            bits = take_int(&c);
            m->group = take_int(&c);
            biases = take_int(&c);
            qk_norm = take_int(&c);
            m->norm_eps = take_float(&c);
            m->rope_scale = take_float(&c);
            if ((bits != 32 && bits != 8 && bits != 4) || biases < 0 || biases > 7 || qk_norm < 0 || qk_norm > 1 || !(m->norm_eps > 0))
                die("%s is not a llama2.c model: %d bits, biases %d, qk_norm %d, norm_eps %g", path, bits, biases, qk_norm, (double)m->norm_eps);
        }
        c.at = data;
        take(&c, 256);
    }
    if (m->version < 3) m->head_dim = m->n_heads > 0 ? m->dim / m->n_heads : 0;
    check_shape(m, path);
    m->q_dim = m->head_dim * m->n_heads;
    m->kv_dim = m->head_dim * m->n_kv_heads;
    if (bits < 32) check_group(m, bits, path);
    else m->group = 0;

    const int dim = m->dim, hidden = m->hidden_dim, rows[] = {m->q_dim, m->kv_dim, m->kv_dim, dim, hidden, dim, hidden};
    const int cols[] = {dim, dim, dim, m->q_dim, dim, hidden, dim}, outer = bits == 4 ? 8 : bits; /* the embedding stays int8 */
    m->layers = zeros((size_t)m->n_layers, sizeof(Layer));
    if (m->version == 3) {
        m->frequency = take_vector(m, &c, m->head_dim / 2);
        m->final_norm = take_vector(m, &c, dim);
        m->embedding = take_matrix(m, &c, outer, m->vocab_size, dim);
        for (int l = 0; l < m->n_layers; l++) load_layer_3(m, &c, &m->layers[l], bits, biases, qk_norm, rows, cols);
    } else {
        if (m->version == 0) m->embedding = take_matrix(m, &c, bits, m->vocab_size, dim);
        for (int l = 0; l < m->n_layers; l++) m->layers[l].attention_norm = take_vector(m, &c, dim);
        if (m->version != 0) {
            for (int l = 0; l < m->n_layers; l++) m->layers[l].ffn_norm = take_vector(m, &c, dim);
            m->final_norm = take_vector(m, &c, dim);
            m->embedding = take_matrix(m, &c, bits, m->vocab_size, dim);
        }
        for (int w = 0; w < MATRICES; w++) {
            if (m->version == 0 && w == W1)
                for (int l = 0; l < m->n_layers; l++) m->layers[l].ffn_norm = take_vector(m, &c, dim);
            for (int l = 0; l < m->n_layers; l++) m->layers[l].w[w] = take_matrix(m, &c, bits, rows[w], cols[w]);
        }
    }
    if (m->version == 0) {
        m->final_norm = take_vector(m, &c, dim);
        take_floats(&c, (uint64_t)m->seq_len * (uint64_t)m->head_dim); /* rope tables, computed here instead */
    }
    m->classifier = shared ? m->embedding : take_matrix(m, &c, outer, m->vocab_size, dim);
    if (m->group < 16) m->group = 0; /* all were widened */
    if (c.at != c.end) die("%s has %zu bytes more than its header asks for", path, (size_t)(c.end - c.at));

    size_t widest = (size_t)(dim > hidden ? dim : hidden);
    if (widest < (size_t)m->q_dim) widest = (size_t)m->q_dim;
    m->x = zeros(BATCH * (size_t)dim, sizeof(float));
    m->xb = zeros(BATCH * (size_t)(dim > m->q_dim ? dim : m->q_dim), sizeof(float));
    m->q = zeros(BATCH * (size_t)m->q_dim, sizeof(float));
    m->hb = zeros(BATCH * (size_t)(dim > hidden ? dim : hidden), sizeof(float)); /* the output projection's, too */
    m->hb2 = zeros(BATCH * (size_t)hidden, sizeof(float));
    m->rope = zeros(BATCH * (size_t)m->head_dim, sizeof(float));
    m->logits = zeros((size_t)m->vocab_size, sizeof(float));
    m->xq = zeros(BATCH * widest, sizeof(int8_t));
    m->xq_scale = zeros(BATCH * widest, sizeof(float));
    m->xq_start = zeros(BATCH * widest / 16, sizeof(Ints));
}

/* Versions 0 to 2: the angles by which positions turn follow from rope_theta. */
static void set_frequencies(Model *m) {
    if (m->frequency) return;
    float *frequency = zeros((size_t)m->head_dim / 2, sizeof(float));
    for (int i = 0; i < m->head_dim / 2; i++) frequency[i] = 1.0f / powf(m->rope_theta, (float)(2 * i) / (float)m->head_dim);
    m->frequency = frequency;
    m->rope_scale = 1.0f;
}

/* Makes room for positions below `end`: the caches grow by doubling, so a short run on a long-context model stays small. */
static void make_room(Model *m, int end) {
    if (end <= m->room) return;
    int room = m->room ? m->room : 64;
    while (room < end) room *= 2;
    m->room = room < m->seq_len ? room : m->seq_len;
    for (int l = 0; l < m->n_layers; l++) {
        Layer *layer = &m->layers[l];
        layer->keys = resize(layer->keys, (size_t)m->room * (size_t)m->kv_dim, sizeof(float));
        layer->values = resize(layer->values, (size_t)m->room * (size_t)m->kv_dim, sizeof(float));
    }
    m->attention = resize(m->attention, (size_t)m->room * (size_t)m->n_heads, sizeof(float));
}

/* ---- products ---- */

#define INLINE __attribute__((always_inline)) static inline

INLINE Floats load_floats(const float *from) {
    Floats v;
    memcpy(&v, from, sizeof v);
    return v;
}

INLINE Ints load_ints(const int32_t *from) {
    Ints v;
    memcpy(&v, from, sizeof v);
    return v;
}

INLINE Bytes load_bytes(const int8_t *from) {
    Bytes v;
    memcpy(&v, from, sizeof v);
    return v;
}

INLINE float total(Floats v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }

/* sum + w * x, four neighbours to a lane. No x is -128; positive: nor is a w below 0. */
INLINE Ints add_products(Ints sum, Bytes w, Bytes x, bool positive) {
#if defined __AVX2__ /* x86 multiplies unsigned by signed: |w| by x with w's sign */
    __m256i a = positive ? (__m256i)w : _mm256_abs_epi8((__m256i)w), b = positive ? (__m256i)x : _mm256_sign_epi8((__m256i)x, (__m256i)w);
#if defined __AVX512VNNI__ && defined __AVX512VL__
    return (Ints)_mm256_dpbusd_epi32((__m256i)sum, a, b);
#else /* |w| is at most 128 and |x| at most 127, so that two products fit 16 bits */
    return sum + (Ints)_mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1));
#endif
#elif defined __ARM_FEATURE_DOTPROD
    int8x16_t a[2], b[2];
    int32x4_t s[2];
    memcpy(a, &w, 32), memcpy(b, &x, 32), memcpy(s, &sum, 32);
    for (int i = 0; i < 2; i++) s[i] = vdotq_s32(s[i], a[i], b[i]);
    memcpy(&sum, s, 32);
    (void)positive;
    return sum;
#else
    (void)positive;
    for (int i = 0; i < 32; i++) sum[i / 4] += w[i] * x[i];
    return sum;
#endif
}

static inline float dot(const float *a, const float *b, int n) {
    Floats sums[4] = {{0}, {0}, {0}, {0}};
    int i = 0;
    for (; i + 32 <= n; i += 32)
        for (int k = 0; k < 4; k++) sums[k] += load_floats(a + i + 8 * k) * load_floats(b + i + 8 * k);
    float sum = total((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* The products of a row of w with the inputs of `tokens` tokens from `first` on, 4 or 1, which go to out[0], out[rows], ... What is said by `tokens`,
 * `bits` and `group` is constant where it matters, so that loops unroll and sums stay in registers. */
#define EACH_TOKEN _Pragma("GCC unroll 4") for (int t = 0; t < tokens; t++)

/* Asks for memory so far ahead that it has come when it is needed. */
INLINE void fetch_ahead(const int8_t *at) { __builtin_prefetch((const void *)((uintptr_t)at + 2048)); }

INLINE void floats(const Matrix *w, size_t row, const float *x, int tokens, float *out) {
    const size_t cols = (size_t)w->cols;
    const float *from = w->f + row * cols;
    Floats sums[4] = {{0}, {0}, {0}, {0}};
    size_t i = 0;
    if (tokens == 1) { /* four sums for it alone */
        for (; i + 32 <= cols; i += 32)
            _Pragma("GCC unroll 4") for (size_t k = 0; k < 4; k++) sums[k] += load_floats(from + i + 8 * k) * load_floats(x + i + 8 * k);
        sums[0] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    } else
        for (; i + 8 <= cols; i += 8) {
            Floats a = load_floats(from + i);
            EACH_TOKEN sums[t] += a * load_floats(x + (size_t)t * cols + i);
        }
    EACH_TOKEN {
        float sum = total(sums[t]) + (w->bias ? w->bias[row] : 0);
        for (size_t k = i; k < cols; k++) sum += from[k] * x[(size_t)t * cols + k];
        out[(size_t)t * (size_t)w->rows] = sum;
    }
}

/* A group of a row by a token's inputs, or the two that share vectors: int4 of 32, int8 of 16. Sums stay apart: adding each up takes longer than its products. */
INLINE Floats group_products(const int8_t *q, const float *scale, const int8_t *x, const float *x_scale, const int32_t *x_start, int bits, int group) {
    Ints one = bits == 4 ? load_ints(x_start) : (Ints){0}, two = bits == 4 && group == 32 ? load_ints(x_start + 8) : (Ints){0};
    if (bits == 4)
        for (int i = 0; i < group || i == 0; i += 64) {
            Halves both = (Halves)load_bytes(q + i / 2);
            one = add_products(one, (Bytes)(both & 15), load_bytes(x + i), true);
            if (group == 32) two = add_products(two, (Bytes)(both >> 4), load_bytes(x + i + 32), true);
            else one = add_products(one, (Bytes)(both >> 4), load_bytes(x + i + 32), true);
        }
    else
        for (int i = 0; i < group; i += 32) one = add_products(one, load_bytes(q + i), load_bytes(x + i), false);
    if (group == 16) {
        const float a = scale[0] * x_scale[0], b = scale[1] * x_scale[1];
        return __builtin_convertvector(one, Floats) * (Floats){a, a, a, a, b, b, b, b};
    }
    Floats sum = __builtin_convertvector(one, Floats) * (scale[0] * x_scale[0]);
    return bits == 4 && group == 32 ? sum + __builtin_convertvector(two, Floats) * (scale[1] * x_scale[1]) : sum;
}

INLINE void integers(const Model *m, const Matrix *w, size_t row, size_t first, int tokens, float *out, int bits, int group) {
    const size_t cols = (size_t)w->cols, groups = cols / (size_t)group, start = first * groups;
    const size_t scales = group == (bits == 4 ? 32 : 16) ? 2 : 1, step = scales * (size_t)group, bytes = bits == 4 ? step / 2 : step;
    const int8_t *q = w->q + row * (bits == 4 ? cols / 2 : cols), *x = m->xq + first * cols;
    const float *scale = w->scale + row * groups;
    Floats sums[4] = {{0}, {0}, {0}, {0}};
    for (size_t i = 0, g = 0; i < cols; i += step, g += scales, q += bytes) {
        fetch_ahead(q);
        EACH_TOKEN {
            const size_t of = start + (size_t)t * groups + g;
            sums[t] += group_products(q, scale + g, x + (size_t)t * cols + i, m->xq_scale + of, m->xq_start + 8 * of, bits, group);
        }
    }
    EACH_TOKEN out[(size_t)t * (size_t)w->rows] = total(sums[t]) + (w->bias ? w->bias[row] : 0);
}

INLINE void products(const Model *m, const Matrix *w, size_t row, const float *x, size_t first, int tokens, float *out, int bits, int group) {
    out += first * (size_t)w->rows + row;
    if (bits == 32) floats(w, row, x + first * (size_t)w->cols, tokens, out);
    else integers(m, w, row, first, tokens, out, bits, group);
}

/* out (n, rows) at rows `from` to `end`, of x (n tokens, cols). A function for each kind of matrix, so that each has the registers to itself. */
#define ROWS(name, bits, group)                                                                                                     \
    static __attribute__((noinline)) void name(const Model *m, const Matrix *w, size_t from, size_t end, const float *x, size_t n, float *out) { \
        for (size_t row = from, t; row < end; row++) {                                                                              \
            for (t = 0; t + 4 <= n; t += 4) products(m, w, row, x, t, 4, out, bits, group);                                         \
            for (; t < n; t++) products(m, w, row, x, t, 1, out, bits, group);                                                      \
        }                                                                                                                           \
    }
ROWS(rows_32, 32, 0)
ROWS(rows_8, 8, w->group)
ROWS(rows_8_16, 8, 16)
ROWS(rows_8_32, 8, 32)
ROWS(rows_8_64, 8, 64)
ROWS(rows_4, 4, w->group)
ROWS(rows_4_32, 4, 32)
ROWS(rows_4_64, 4, 64)

typedef void Rows(const Model *, const Matrix *, size_t, size_t, const float *, size_t, float *);

static Rows *rows_of(const Matrix *w) {
    if (w->bits == 32) return rows_32;
    if (w->bits == 4) return w->group == 64 ? rows_4_64 : w->group == 32 ? rows_4_32 : rows_4;
    return w->group == 64 ? rows_8_64 : w->group == 32 ? rows_8_32 : w->group == 16 ? rows_8_16 : rows_8;
}

/* Makes integers of x (n tokens, cols), where the weights are: each group by its largest value. */
static void set_input(Model *m, const float *x, int n, int cols) {
    if (!m->group) return;
    const int groups = n * (cols / m->group);
    for (int g = 0; g < groups; g++) {
        const float *from = x + (size_t)g * (size_t)m->group;
        int8_t *to = m->xq + (size_t)g * (size_t)m->group;
        float most = 0;
        for (int i = 0; i < m->group; i++) most = fabsf(from[i]) > most ? fabsf(from[i]) : most;
        float scale = most / 127.0f, inverse = scale > 0 ? 1.0f / scale : 0;
        m->xq_scale[g] = scale;
        int sum = 0;
        for (int i = 0; i < m->group; i++) {
            float value = from[i] * inverse;
            to[i] = (int8_t)rintf(!(value > -127.0f) ? -127.0f : value > 127.0f ? 127.0f : value); /* NaN, as of infinity times 0, is -127 */
            sum += to[i];
        }
        m->xq_start[8 * (size_t)g] = -8 * sum;
    }
}

typedef struct {
    float *out; /* (n, rows) */
    const Matrix *w;
} Product;

#define TOGETHER ((size_t)16) /* rows that a thread takes at a time */

static size_t pieces(const Matrix *w) { return ((size_t)w->rows + TOGETHER - 1) / TOGETHER; }

/* out = x w^T + bias of up to three matrices with one input x (n tokens, cols). Row after row, which is how memory is read ahead. */
static void multiply(Model *m, const float *x, int n, const Product *of, int count) {
    size_t all = 0;
    for (int i = 0; i < count; i++) all += pieces(of[i].w);
    set_input(m, x, n, of[0].w->cols);
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < all; i++) {
        const Product *p = of;
        size_t piece = i;
        for (; piece >= pieces(p->w); p++) piece -= pieces(p->w);
        const size_t from = piece * TOGETHER, rows = (size_t)p->w->rows;
        rows_of(p->w)(m, p->w, from, from + TOGETHER < rows ? from + TOGETHER : rows, x, (size_t)n, p->out);
    }
}

static void rmsnorm(float *out, const float *x, const float *weight, int n, float eps) {
    float scale = 1.0f / sqrtf(dot(x, x, n) / (float)n + eps);
    for (int i = 0; i < n; i++) out[i] = weight[i] * (x[i] * scale);
}

static void rmsnorms(float *out, const float *x, const float *weight, int rows, int n, float eps) {
    for (int i = 0; i < rows; i++) rmsnorm(out + (size_t)i * (size_t)n, x + (size_t)i * (size_t)n, weight, n, eps);
}

/* e^x, to 1e-6 of it for |x| < 20; from |x| = 87 on it stays. Loops over this run in vectors, those over expf do not. */
static inline float exponential(float x) {
    float power = x * 1.44269504f;
    power = !(power > -126.0f) ? -126.0f : power > 126.0f ? 126.0f : power;
    int32_t whole = (int32_t)(power + 127.5f), bits = whole << 23; /* 2^(whole - 127) as a float's bits */
    float scale, part = power - (float)(whole - 127);
    memcpy(&scale, &bits, sizeof scale);
    /* 2^part for |part| <= 1/2 by its Taylor series: ln(2)^k / k! */
    float series = 1.52527e-5f;
    series = series * part + 1.540353e-4f;
    series = series * part + 1.3333558e-3f;
    series = series * part + 9.618129e-3f;
    series = series * part + 5.5504109e-2f;
    series = series * part + 0.24022651f;
    series = series * part + 0.69314718f;
    return scale * (series * part + 1.0f);
}

static void softmax(float *x, int n) {
    float most = x[0], sum = 0;
    for (int i = 1; i < n; i++)
        if (x[i] > most) most = x[i];
    for (int i = 0; i < n; i++) sum += x[i] = exponential(x[i] - most);
    for (int i = 0; i < n; i++) x[i] /= sum;
}

/* Turns each pair (2i, 2i+1) of every head by the angle of its token's position. x: (n tokens, heads, head_dim). */
static void rotate(const Model *m, float *x, int n, int heads) {
    for (int t = 0; t < n; t++) {
        const float *rope = m->rope + (size_t)t * (size_t)m->head_dim;
        for (int h = 0; h < heads; h++, x += m->head_dim)
            for (int i = 0; i < m->head_dim; i += 2) {
                float cosine = rope[i], sine = rope[i + 1], a = x[i], b = x[i + 1];
                x[i] = a * cosine - b * sine;
                x[i + 1] = a * sine + b * cosine;
            }
    }
}

/* out (n tokens, q_dim) of the queries at positions pos, pos + 1, ..., each with the keys up to its own. */
static void attend(const Model *m, const Layer *layer, float *out, int n, int pos) {
    const int head_dim = m->head_dim, share = m->n_heads / m->n_kv_heads;
    const float scale = 1.0f / sqrtf((float)head_dim);
#pragma omp parallel for
    for (int h = 0; h < m->n_heads; h++) {
        float *score = m->attention + (size_t)h * (size_t)m->room;
        const size_t head = (size_t)(h / share) * (size_t)head_dim, stride = (size_t)m->kv_dim;
        for (int b = 0; b < n; b++) {
            const size_t query = (size_t)b * (size_t)m->q_dim + (size_t)h * (size_t)head_dim;
            const float *q = m->q + query, *v = layer->values + head;
            float *restrict to = out + query;
            const int last = pos + b;
            for (int t = 0; t <= last; t++) score[t] = scale * dot(q, layer->keys + (size_t)t * stride + head, head_dim);
            softmax(score, last + 1);
            memset(to, 0, (size_t)head_dim * sizeof(float));
            int t = 0;
            for (; t + 3 <= last; t += 4, v += 4 * stride) /* four at a time, since each reads and writes all of `to` */
                for (int i = 0; i < head_dim; i++)
                    to[i] += score[t] * v[i] + score[t + 1] * v[stride + i] + score[t + 2] * v[2 * stride + i] + score[t + 3] * v[3 * stride + i];
            for (; t <= last; t++, v += stride)
                for (int i = 0; i < head_dim; i++) to[i] += score[t] * v[i];
        }
    }
}

static void embed(const Model *m, int token, float *x) {
    const Matrix *e = &m->embedding;
    const size_t row = (size_t)token * (size_t)m->dim;
    for (size_t i = 0; i < (size_t)m->dim; i++) x[i] = e->bits == 32 ? e->f[row + i] : (float)e->q[row + i] * e->scale[(row + i) / (size_t)e->group];
}

/* Reads n tokens (at most BATCH) at positions pos, pos + 1, ... into the caches. Returns the logits (vocab_size) after the last, or NULL unless wanted. */
static float *forward(Model *m, const int *tokens, int n, int pos, bool want_logits) {
    const int dim = m->dim;
    const size_t all = (size_t)n * (size_t)dim, wide = (size_t)n * (size_t)m->hidden_dim;
    make_room(m, pos + n);
    for (int t = 0; t < n; t++) {
        embed(m, tokens[t], m->x + (size_t)t * (size_t)dim);
        for (int i = 0; i < m->head_dim; i += 2) {
            float angle = (float)(pos + t) * m->frequency[i / 2], *to = m->rope + (size_t)t * (size_t)m->head_dim + i;
            to[0] = m->rope_scale * cosf(angle);
            to[1] = m->rope_scale * sinf(angle);
        }
    }

    for (int l = 0; l < m->n_layers; l++) {
        Layer *layer = &m->layers[l];
        const Matrix *w = layer->w;
        float *key = layer->keys + (size_t)pos * (size_t)m->kv_dim, *value = layer->values + (size_t)pos * (size_t)m->kv_dim;
        const bool caches_only = !want_logits && l == m->n_layers - 1;
        rmsnorms(m->xb, m->x, layer->attention_norm, n, dim, m->norm_eps);
        multiply(m, m->xb, n, (Product[]){{key, &w[WK]}, {value, &w[WV]}, {m->q, &w[WQ]}}, caches_only ? 2 : 3);
        if (layer->k_norm) rmsnorms(key, key, layer->k_norm, n * m->n_kv_heads, m->head_dim, m->norm_eps);
        rotate(m, key, n, m->n_kv_heads);
        if (caches_only) return NULL;
        if (layer->q_norm) rmsnorms(m->q, m->q, layer->q_norm, n * m->n_heads, m->head_dim, m->norm_eps);
        rotate(m, m->q, n, m->n_heads);
        attend(m, layer, m->xb, n, pos);
        multiply(m, m->xb, n, (Product[]){{m->hb, &w[WO]}}, 1);
        for (size_t i = 0; i < all; i++) m->x[i] += m->hb[i];

        rmsnorms(m->xb, m->x, layer->ffn_norm, n, dim, m->norm_eps);
        multiply(m, m->xb, n, (Product[]){{m->hb, &w[W1]}, {m->hb2, &w[W3]}}, 2);
        for (size_t i = 0; i < wide; i++) m->hb[i] = m->hb[i] / (1.0f + exponential(-m->hb[i])) * m->hb2[i];
        multiply(m, m->hb, n, (Product[]){{m->xb, &w[W2]}}, 1);
        for (size_t i = 0; i < all; i++) m->x[i] += m->xb[i];
    }
    float *last = m->x + all - (size_t)dim;
    rmsnorm(last, last, m->final_norm, dim, m->norm_eps);
    multiply(m, last, 1, (Product[]){{m->logits, &m->classifier}}, 1);
    return m->logits;
}

/* ---- choosing the next token ---- */

typedef struct {
    float temperature, topp;
    uint64_t state;
    struct Choice {
        float p;
        int id;
    } *choices;
} Sampler;

static int argmax(const float *x, int n) {
    int best = 0;
    for (int from = 0, end; from < n; from = end) { /* whether any of a block is larger shows in vectors */
        int larger = 0;
        end = n - from < 256 ? n : from + 256;
        for (int i = from; i < end; i++) larger |= x[i] > x[best];
        for (int i = from; larger && i < end; i++)
            if (x[i] > x[best]) best = i;
    }
    return best;
}

static float coin(Sampler *s) { /* splitmix64, in [0, 1) */
    uint64_t z = s->state += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return (float)((z ^ (z >> 31)) >> 40) / 16777216.0f;
}

static int by_probability(const void *a, const void *b) {
    const struct Choice *x = a, *y = b;
    return x->p != y->p ? (x->p < y->p) - (x->p > y->p) : (x->id > y->id) - (x->id < y->id);
}

/* Greedy at temperature 0; else a draw from the fewest likeliest tokens whose probabilities reach topp. */
static int sample(Sampler *s, float *logits, int n) {
    if (s->temperature == 0) return argmax(logits, n);
    for (int i = 0; i < n; i++) logits[i] /= s->temperature;
    softmax(logits, n);
    bool nucleus = s->topp > 0 && s->topp < 1;
    /* A token below this cannot be among those that reach topp, and sorting the rest is quick. */
    float least = nucleus && n > 1 ? (1.0f - s->topp) / (float)(n - 1) : 0;
    int kept = 0;
    for (int i = 0; i < n; i++)
        if (logits[i] >= least) s->choices[kept++] = (struct Choice){logits[i], i};
    if (kept == 0) return argmax(logits, n);
    float mass = 0;
    if (nucleus) {
        qsort(s->choices, (size_t)kept, sizeof *s->choices, by_probability);
        int enough = 0;
        while (enough < kept && mass <= s->topp) mass += s->choices[enough++].p;
        kept = enough;
    } else {
        for (int i = 0; i < kept; i++) mass += s->choices[i].p;
    }
    float at = coin(s) * mass, sum = 0;
    for (int i = 0; i < kept; i++)
        if (at < (sum += s->choices[i].p)) return s->choices[i].id;
    return s->choices[kept - 1].id;
}

/* ---- the tokenizer ---- */

enum Split { SPLIT_NONE, SPLIT_SPACES, SPLIT_GPT2, SPLIT_DIGITS_GPT2, SPLIT_LLAMA3, SPLIT_QWEN2 };
static const char *const SPLITS[] = {"none", "spaces", "gpt2", "digits_gpt2", "llama3", "qwen2"};
enum Prefix { PREFIX_NEVER, PREFIX_FIRST, PREFIX_ALWAYS };
static const char *const PREFIXES[] = {"never", "first", "always"};

typedef struct {
    uint64_t pair; /* left id << 32 | right id */
    int rank, id;  /* id -1: an empty slot */
} Merge;

typedef struct {
    uint32_t low, high;
} Range;

typedef struct {
    Range *at;
    size_t size;
} Ranges;

/* A character that is canonically equal to two others, or to one (second 0). */
typedef struct {
    uint32_t code, first, second;
    bool composes; /* the two become it again */
} Canonical;

typedef struct {
    Range range;
    int class; /* of combining: marks of lower ones come first */
} Marks;

typedef struct {
    Str text;
    int id;
} Special;

typedef struct {
    int vocab_size;
    Str *pieces;   /* [id], bytes as printed */
    float *scores; /* [id] */
    bool *hidden;  /* [id], not printed */
    int byte_id[256], *lookup;
    size_t lookup_slots, merge_count, merge_slots;
    bool byte_level, fuse_unk, whole_words, prefix_unless_space, strip_space;
    int unk;
    enum Split split;
    enum Prefix prefix;
    Merge *merges; /* hash table; NULL: pairs rank by the score of what they make, as in llama2.c */
    Ranges letters, numbers;
    Canonical *canonical, *composed; /* by code, and those that compose by first and second; NULL: text is not normalized */
    Marks *marks;
    size_t canonical_count, composed_count, marks_count;
    Special *specials;
    size_t special_count;
    bool special_starts[256];
    Ids begin, stop;
} Tokenizer;

/* What the model's chat template puts around the texts: opens with a system text or without, then users and answers. */
typedef struct {
    bool available, takes_system, trim_system, trim_user, trim_answer;
    Text system_open, system_close, open, answer, generate, next, reason;
} Chat;

static size_t hash_bytes(Str s) { /* FNV-1a */
    uint64_t h = 0xCBF29CE484222325u;
    for (size_t i = 0; i < s.size; i++) h = (h ^ (unsigned char)s.at[i]) * 0x100000001B3u;
    return (size_t)(h ^ (h >> 32));
}

static size_t hash_pair(uint64_t pair) {
    pair = (pair ^ (pair >> 31)) * 0x9E3779B97F4A7C15u;
    return (size_t)(pair ^ (pair >> 32));
}

/* The lowest id with these bytes, or -1. */
static int find_piece(const Tokenizer *t, Str s) {
    for (size_t slot = hash_bytes(s) % t->lookup_slots;; slot = (slot + 1) % t->lookup_slots) {
        int id = t->lookup[slot];
        if (id < 0 || same(t->pieces[id], s)) return id;
    }
}

/* Byte 0..255 of a piece such as <0x0A>, or -1. */
static int byte_of(Str s) {
    if (s.size != 6 || memcmp(s.at, "<0x", 3) != 0 || s.at[5] != '>') return -1;
    int value = 0;
    for (int i = 3; i < 5; i++) {
        const char *digit = strchr("0123456789ABCDEF", s.at[i]);
        if (!digit || !s.at[i]) return -1;
        value = value * 16 + (int)(digit - "0123456789ABCDEF");
    }
    return value;
}

static void load_tokenizer(Tokenizer *t, const char *path, int vocab_size) {
    size_t size;
    const unsigned char *data = map_file(path, &size);
    if (!data) die("cannot open %s: %s", path, strerror(errno));
    Cursor c = {path, data, data, data + size};
    size_t count = (size_t)vocab_size;
    if (size / 8 < count) die("%s is cut short or for another model: this one has %d tokens", path, vocab_size);
    t->vocab_size = vocab_size;
    t->pieces = zeros(count, sizeof(Str));
    t->scores = zeros(count, sizeof(float));
    t->hidden = zeros(count, sizeof(bool));
    take_int(&c); /* the longest piece, which nothing here needs */
    for (int id = 0; id < vocab_size; id++) {
        memcpy(&t->scores[id], take(&c, 4), 4);
        int32_t length = take_int(&c);
        if (length < 0) die("%s is damaged: token %d has length %d", path, id, length);
        t->pieces[id] = (Str){take(&c, (uint64_t)length), (size_t)length};
    }
    if (c.at != c.end) die("%s is for another model: it has more than the %d tokens of this one", path, vocab_size);

    t->lookup_slots = 2 * count + 1;
    t->lookup = resize(NULL, t->lookup_slots, sizeof(int));
    for (size_t i = 0; i < t->lookup_slots; i++) t->lookup[i] = -1;
    for (int id = 0; id < vocab_size; id++) {
        size_t slot = hash_bytes(t->pieces[id]) % t->lookup_slots;
        while (t->lookup[slot] >= 0 && !same(t->pieces[t->lookup[slot]], t->pieces[id])) slot = (slot + 1) % t->lookup_slots;
        if (t->lookup[slot] < 0) t->lookup[slot] = id;
    }
}

/* Each byte's own token: <0xHH> in a sentencepiece vocabulary, the piece of that one byte in a byte-level one. */
static void find_bytes(Tokenizer *t) {
    for (int i = 0; i < 256; i++) {
        char byte = (char)i;
        t->byte_id[i] = t->byte_level ? find_piece(t, (Str){&byte, 1}) : -1;
    }
    for (int id = t->vocab_size - 1; !t->byte_level && id >= 0; id--)
        if (byte_of(t->pieces[id]) >= 0) t->byte_id[byte_of(t->pieces[id])] = id;
}

typedef struct {
    double rank; /* lower merges first */
    int id;      /* -1: this pair does not merge */
} Candidate;

static Candidate candidate(const Tokenizer *t, int left, int right, Text *joined) {
    Candidate none = {0, -1};
    if (!t->merges) {
        joined->size = 0;
        append(joined, t->pieces[left].at, t->pieces[left].size);
        append(joined, t->pieces[right].at, t->pieces[right].size);
        int id = find_piece(t, (Str){joined->at, joined->size});
        return id < 0 ? none : (Candidate){-(double)t->scores[id], id};
    }
    uint64_t pair = (uint64_t)left << 32 | (uint64_t)right;
    for (size_t slot = hash_pair(pair) % t->merge_slots;; slot = (slot + 1) % t->merge_slots) {
        const Merge *merge = &t->merges[slot];
        if (merge->id < 0) return none;
        if (merge->pair == pair) return (Candidate){merge->rank, merge->id};
    }
}

/* Merges ids->at[from..] until no pair of neighbours merges: the lowest rank first, the leftmost on ties. */
static void merge_word(const Tokenizer *t, Ids *ids, size_t from) {
    int *id = ids->at + from;
    size_t n = ids->size - from;
    if (n < 2) return;
    Text joined = {0};
    Candidate *pairs = resize(NULL, n, sizeof(Candidate)); /* [i]: of i and i + 1 */
    for (size_t i = 0; i + 1 < n; i++) pairs[i] = candidate(t, id[i], id[i + 1], &joined);
    while (n > 1) {
        size_t best = n;
        for (size_t i = 0; i + 1 < n; i++)
            if (pairs[i].id >= 0 && (best == n || pairs[i].rank < pairs[best].rank)) best = i;
        if (best == n) break;
        id[best] = pairs[best].id;
        memmove(id + best + 1, id + best + 2, (n - best - 2) * sizeof *id);
        memmove(pairs + best, pairs + best + 1, (n - best - 2) * sizeof *pairs);
        n--;
        if (best + 1 < n) pairs[best] = candidate(t, id[best], id[best + 1], &joined);
        if (best > 0) pairs[best - 1] = candidate(t, id[best - 1], id[best], &joined);
    }
    ids->size = from + n;
    free(pairs);
    free(joined.at);
}

/* Reads one character; a byte that is not UTF-8 counts as one. Returns its length, and its code point in *code. */
static size_t read_char(const char *at, size_t left, uint32_t *code) {
    const unsigned char *s = (const unsigned char *)at;
    size_t size = s[0] < 0x80 ? 1 : s[0] >= 0xC2 && s[0] < 0xE0 ? 2 : s[0] >= 0xE0 && s[0] < 0xF0 ? 3 : s[0] >= 0xF0 && s[0] < 0xF5 ? 4 : 0;
    *code = size == 1 ? s[0] : s[0] & (0x7Fu >> size);
    bool valid = size > 0 && size <= left;
    for (size_t i = 1; valid && i < size; i++) {
        valid = (s[i] & 0xC0) == 0x80;
        *code = *code << 6 | (s[i] & 0x3Fu);
    }
    if (valid) return size;
    *code = 0xFFFD;
    return 1;
}

static void encode_word(const Tokenizer *t, Str word, Ids *ids) {
    size_t start = ids->size;
    int whole = t->whole_words ? find_piece(t, word) : -1;
    if (whole >= 0) {
        push(ids, whole);
        return;
    }
    bool after_unk = false;
    for (size_t at = 0, size; at < word.size; at += size) {
        uint32_t code;
        size = t->byte_level ? 1 : read_char(word.at + at, word.size - at, &code);
        int id = t->byte_level ? -1 : find_piece(t, (Str){word.at + at, size});
        bool bytes = id < 0;
        for (size_t i = 0; bytes && i < size; i++) bytes = t->byte_id[(unsigned char)word.at[at + i]] >= 0;
        if (id >= 0) push(ids, id);
        for (size_t i = 0; bytes && i < size; i++) push(ids, t->byte_id[(unsigned char)word.at[at + i]]);
        bool unk = id < 0 && !bytes;
        if (unk && t->unk >= 0 && !(after_unk && t->fuse_unk)) push(ids, t->unk);
        after_unk = unk;
    }
    merge_word(t, ids, start);
}

/* ---- Unicode's normalization form C ---- */

typedef struct {
    uint32_t *at; /* code points; a byte that is not UTF-8 is NOT_UTF8 + byte */
    size_t size, room;
} Codes;

enum { NOT_UTF8 = 0x110000, L_BASE = 0x1100, V_BASE = 0x1161, T_BASE = 0x11A7, S_BASE = 0xAC00, L_COUNT = 19, V_COUNT = 21, T_COUNT = 28 };

static void push_code(Codes *codes, uint32_t code) {
    if (codes->size == codes->room) {
        codes->room = 2 * codes->room + 64;
        codes->at = resize(codes->at, codes->room, sizeof(uint32_t));
    }
    codes->at[codes->size++] = code;
}

static void append_code(Text *text, uint32_t c) {
    if (c >= NOT_UTF8) c -= NOT_UTF8;
    else if (c >= 0x80) {
        char bytes[4];
        size_t size = c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
        for (size_t i = size; i-- > 1; c >>= 6) bytes[i] = (char)(0x80 | (c & 0x3F));
        bytes[0] = (char)((0xF00u >> size & 0xFF) | c);
        append(text, bytes, size);
        return;
    }
    append(text, &(char){(char)c}, 1);
}

static int combining_class(const Tokenizer *t, uint32_t code) {
    size_t low = 0, high = t->marks_count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (code > t->marks[middle].range.high) low = middle + 1;
        else high = middle;
    }
    return low < t->marks_count && code >= t->marks[low].range.low ? t->marks[low].class : 0;
}

static void decompose(const Tokenizer *t, uint32_t code, int depth, Codes *out) {
    uint32_t syllable = code - S_BASE;
    if (code >= S_BASE && syllable < L_COUNT * V_COUNT * T_COUNT) {
        push_code(out, L_BASE + syllable / (V_COUNT * T_COUNT));
        push_code(out, V_BASE + syllable / T_COUNT % V_COUNT);
        if (syllable % T_COUNT) push_code(out, T_BASE + syllable % T_COUNT);
        return;
    }
    size_t low = 0, high = t->canonical_count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (code > t->canonical[middle].code) low = middle + 1;
        else high = middle;
    }
    if (depth == 0 || low == t->canonical_count || t->canonical[low].code != code) { /* no real character goes deeper than 4 */
        push_code(out, code);
        return;
    }
    decompose(t, t->canonical[low].first, depth - 1, out);
    if (t->canonical[low].second) decompose(t, t->canonical[low].second, depth - 1, out);
}

static int by_parts(const void *a, const void *b) {
    const Canonical *x = a, *y = b;
    return x->first != y->first ? (x->first > y->first) - (x->first < y->first) : (x->second > y->second) - (x->second < y->second);
}

/* The character that two make together, or 0. */
static uint32_t compose(const Tokenizer *t, uint32_t first, uint32_t second) {
    if (first - L_BASE < L_COUNT && second - V_BASE < V_COUNT) return S_BASE + ((first - L_BASE) * V_COUNT + (second - V_BASE)) * T_COUNT;
    if (first - S_BASE < L_COUNT * V_COUNT * T_COUNT && (first - S_BASE) % T_COUNT == 0 && second - T_BASE - 1 < T_COUNT - 1)
        return first + (second - T_BASE);
    Canonical wanted = {0, first, second, true};
    const Canonical *found = bsearch(&wanted, t->composed, t->composed_count, sizeof wanted, by_parts);
    return found ? found->code : 0;
}

/* Decomposes text, puts marks in order and composes it again. False where it is as it should be, by no character being one that could be otherwise. */
static bool normalize(const Tokenizer *t, Str text, Text *out) {
    Codes codes = {0};
    bool plain = true;
    for (size_t at = 0, size; at < text.size; at += size) {
        uint32_t code;
        size = read_char(text.at + at, text.size - at, &code);
        if (code >= 0x300) plain = false;
        if (size == 1 && code > 0x7F) push_code(&codes, NOT_UTF8 + (unsigned char)text.at[at]);
        else decompose(t, code, 8, &codes);
    }
    for (size_t i = 0, end; !plain && i < codes.size; i = end + 1) { /* i to end: marks; an insertion sort, since they are few */
        for (end = i; end < codes.size && combining_class(t, codes.at[end]); end++)
            for (size_t k = end; k > i && combining_class(t, codes.at[k - 1]) > combining_class(t, codes.at[k]); k--) {
                uint32_t swapped = codes.at[k];
                codes.at[k] = codes.at[k - 1];
                codes.at[k - 1] = swapped;
            }
    }
    size_t kept = 0, starter = SIZE_MAX;
    int last = 0; /* class of the character before, where it was kept behind the starter */
    for (size_t i = 0; !plain && i < codes.size; i++) {
        int class = combining_class(t, codes.at[i]);
        bool adjacent = starter != SIZE_MAX && starter + 1 == kept;
        uint32_t both = starter != SIZE_MAX && (adjacent || (last && last < class)) ? compose(t, codes.at[starter], codes.at[i]) : 0;
        if (both) {
            codes.at[starter] = both;
            continue;
        }
        if (!class) starter = kept;
        last = class;
        codes.at[kept++] = codes.at[i];
    }
    for (size_t i = 0; !plain && i < kept; i++) append_code(out, codes.at[i]);
    free(codes.at);
    return !plain;
}

/* ---- words ---- */

enum Kind { LETTER, NUMBER, SPACE, OTHER };

typedef struct {
    uint32_t code;
    enum Kind kind;
    size_t at; /* byte offset */
} Char;

static bool in_ranges(const Ranges *ranges, uint32_t code) {
    size_t low = 0, high = ranges->size;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (code > ranges->at[middle].high) low = middle + 1;
        else high = middle;
    }
    return low < ranges->size && code >= ranges->at[low].low;
}

static bool is_space(uint32_t c) { /* Unicode's White_Space, which \s matches */
    return (c >= 9 && c <= 13) || c == ' ' || c == 0x85 || c == 0xA0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200A) ||
           c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

static bool is_newline(Char c) { return c.code == '\n' || c.code == '\r'; }

static size_t run_end(const Char *c, size_t i, size_t n, enum Kind kind) {
    while (i < n && c[i].kind == kind) i++;
    return i;
}

/* Where the contraction at i ends ('s 't 'm 'd 're 've 'll), or i. */
static size_t contraction_end(const Char *c, size_t i, size_t n, bool any_case) {
    if (c[i].code != '\'' || i + 1 >= n) return i;
    uint32_t letters[2] = {0, 0};
    for (size_t k = 0; k < 2 && i + 1 + k < n; k++) {
        letters[k] = c[i + 1 + k].code;
        if (any_case && letters[k] >= 'A' && letters[k] <= 'Z') letters[k] += 'a' - 'A';
        if (any_case && letters[k] == 0x17F) letters[k] = 's'; /* the long s folds to s */
    }
    if (letters[0] == 's' || letters[0] == 't' || letters[0] == 'm' || letters[0] == 'd') return i + 2;
    bool two = (letters[0] == 'r' && letters[1] == 'e') || (letters[0] == 'v' && letters[1] == 'e') || (letters[0] == 'l' && letters[1] == 'l');
    return two ? i + 3 : i;
}

/* White space that starts at i, less its last character where a word follows: that one belongs to the word. */
static size_t space_end(const Char *c, size_t i, size_t n) {
    size_t end = run_end(c, i, n, SPACE);
    return end < n && end - i > 1 ? end - 1 : end;
}

/* The end of GPT-2's match at i: contractions, " ?letters", " ?numbers", " ?others", white space. */
static size_t gpt2_end(const Char *c, size_t i, size_t n) {
    size_t end = contraction_end(c, i, n, false), word = i + (c[i].code == ' ' && i + 1 < n);
    if (end > i) return end;
    return c[word].kind == SPACE ? space_end(c, i, n) : run_end(c, word, n, c[word].kind);
}

/* The end of Llama 3's match at i (Qwen2's with one digit at a time): any one other character may lead a word, and
 * newlines stay with the punctuation or the white space before them. */
static size_t llama3_end(const Char *c, size_t i, size_t n, size_t digits) {
    size_t end = contraction_end(c, i, n, true);
    if (end > i) return end;
    if (c[i].kind == LETTER) return run_end(c, i, n, LETTER);
    if (c[i].kind != NUMBER && !is_newline(c[i]) && i + 1 < n && c[i + 1].kind == LETTER) return run_end(c, i + 1, n, LETTER);
    if (c[i].kind == NUMBER) {
        end = run_end(c, i, n, NUMBER);
        return end - i > digits ? i + digits : end;
    }
    size_t word = i + (c[i].code == ' ' && i + 1 < n);
    if (c[word].kind == OTHER) {
        for (end = run_end(c, word, n, OTHER); end < n && is_newline(c[end]);) end++;
        return end;
    }
    for (end = run_end(c, i, n, SPACE); end > i; end--)
        if (is_newline(c[end - 1])) return end;
    return space_end(c, i, n);
}

/* Cuts text as the tokenizer's regular expression does and encodes the words. */
static void encode_split(const Tokenizer *t, Str text, Ids *ids) {
    Char *c = resize(NULL, text.size + 1, sizeof(Char));
    size_t n = 0;
    for (size_t at = 0; at < text.size; n++) {
        size_t size = read_char(text.at + at, text.size - at, &c[n].code);
        uint32_t code = c[n].code;
        c[n].kind = is_space(code) ? SPACE : in_ranges(&t->letters, code) ? LETTER : in_ranges(&t->numbers, code) ? NUMBER : OTHER;
        c[n].at = at;
        at += size;
    }
    c[n].at = text.size;
    for (size_t i = 0, end, stop = 0; i < n; i = end) {
        if (i >= stop && t->split == SPLIT_DIGITS_GPT2) { /* each digit is a text of its own, and so is what lies between */
            stop = i + 1;
            while (c[i].kind != NUMBER && stop < n && c[stop].kind != NUMBER) stop++;
        } else if (i >= stop) {
            stop = n;
        }
        end = t->split == SPLIT_LLAMA3 ? llama3_end(c, i, stop, 3) : t->split == SPLIT_QWEN2 ? llama3_end(c, i, stop, 1) : gpt2_end(c, i, stop);
        encode_word(t, (Str){text.at + c[i].at, c[end].at - c[i].at}, ids);
    }
    free(c);
}

/* Encodes text between two special tokens. The pieces hold a space where sentencepiece writes U+2581. */
static void encode_section(const Tokenizer *t, Str text, bool first, Ids *ids) {
    if (text.size == 0) return;
    if (t->byte_level) {
        Text normal = {0};
        if (t->canonical && normalize(t, text, &normal)) text = (Str){normal.at, normal.size};
        encode_split(t, text, ids);
        free(normal.at);
        return;
    }
    Text spaced = {0};
    bool prefix = t->prefix == PREFIX_ALWAYS || (t->prefix == PREFIX_FIRST && first);
    bool has_space = text.at[0] == ' ' || (text.size >= 3 && memcmp(text.at, "\xE2\x96\x81", 3) == 0);
    if (prefix && !(t->prefix_unless_space && has_space)) append(&spaced, " ", 1);
    for (size_t at = 0, size; at < text.size; at += size) {
        bool mark = text.size - at >= 3 && memcmp(text.at + at, "\xE2\x96\x81", 3) == 0;
        size = mark ? 3 : 1;
        append(&spaced, mark ? " " : text.at + at, 1);
    }
    for (size_t at = 0, end; at < spaced.size; at = end) {
        end = t->split == SPLIT_SPACES ? at + 1 : spaced.size;
        while (end < spaced.size && spaced.at[end] != ' ') end++;
        encode_word(t, (Str){spaced.at + at, end - at}, ids);
    }
    free(spaced.at);
}

/* The longest special token at the start of the text, or NULL. */
static const Special *special_at(const Tokenizer *t, Str text) {
    const Special *best = NULL;
    if (!t->special_starts[(unsigned char)text.at[0]]) return NULL;
    for (size_t i = 0; i < t->special_count; i++) {
        const Special *s = &t->specials[i];
        if (s->text.size <= text.size && memcmp(s->text.at, text.at, s->text.size) == 0 && (!best || s->text.size > best->text.size))
            best = s;
    }
    return best;
}

/* Token ids of a text. Special tokens written out in it become themselves; `begin` puts the model's BOS in front. */
static Ids encode(const Tokenizer *t, Str text, bool begin) {
    Ids ids = {0};
    for (size_t i = 0; begin && i < t->begin.size; i++) push(&ids, t->begin.at[i]);
    size_t from = 0, at = 0;
    while (at < text.size) {
        const Special *special = special_at(t, (Str){text.at + at, text.size - at});
        if (!special) {
            at++;
            continue;
        }
        encode_section(t, (Str){text.at + from, at - from}, from == 0, &ids);
        push(&ids, special->id);
        from = at += special->text.size;
    }
    encode_section(t, (Str){text.at + from, text.size - from}, from == 0, &ids);
    return ids;
}

/* Adds the token's bytes to out. `first`: it opens the text, so a sentencepiece space in front of it is dropped. */
static void decode(const Tokenizer *t, int id, bool first, Text *out) {
    Str piece = t->pieces[id];
    int byte = t->byte_level ? -1 : byte_of(piece);
    char raw = (char)byte;
    if (t->hidden[id]) return;
    if (byte >= 0) piece = (Str){&raw, 1};
    bool drop = first && t->strip_space && piece.size && piece.at[0] == ' ';
    append(out, piece.at + drop, piece.size - drop);
}

/* ---- runtime.cfg ---- */

/* Turns \n \t \r \\ \xHH in place into their bytes; false where the escape is unknown. */
static bool unescape(char *from, size_t size, Text *out) {
    out->size = 0;
    for (size_t i = 0; i < size; i++) {
        char c = from[i];
        if (c == '\\') {
            if (++i == size) return false;
            const char *known = "n\nt\tr\r\\\\";
            for (c = 0; *known; known += 2)
                if (from[i] == known[0]) c = known[1];
            char hex[3] = {0}, *end = hex;
            if (from[i] == 'x' && size - i > 2) {
                memcpy(hex, from + i + 1, 2);
                c = (char)strtoul(hex, &end, 16);
                i += 2;
            }
            if (end != hex + strlen(hex) || (!c && !*hex)) return false;
        }
        append(out, &c, 1);
    }
    append(out, "", 1); /* so that an empty text is a text too, and ends as C strings do */
    out->size--;
    return true;
}

typedef struct {
    const char *path;
    int line;
    char *value;
    size_t file_size;
} Entry;

__attribute__((noreturn)) static void bad_entry(const Entry *e) { die("%s is damaged at line %d", e->path, e->line); }

static long entry_int(Entry *e, long least, long most) {
    char *end;
    errno = 0;
    long value = strtol(e->value, &end, 10);
    if (end == e->value || errno || value < least || value > most || (*end && *end != ' ')) bad_entry(e);
    e->value = *end ? end + 1 : end;
    return value;
}

static float entry_float(Entry *e) {
    char *end;
    float value = strtof(e->value, &end);
    if (end == e->value || *end || !(value > 0) || isinf(value)) bad_entry(e);
    return value;
}

static int entry_word(Entry *e, const char *const *words, int count) {
    for (int i = 0; i < count; i++)
        if (strcmp(e->value, words[i]) == 0) return i;
    bad_entry(e);
}

static void entry_ids(Entry *e, Ids *ids, int vocab_size) {
    while (*e->value) push(ids, (int)entry_int(e, 0, vocab_size - 1));
}

static void entry_text(Entry *e, Text *text) {
    if (!unescape(e->value, strlen(e->value), text)) bad_entry(e);
}

static void entry_ranges(Entry *e, Ranges *ranges) { /* "41-5a 61-7a", ascending */
    for (char *at = e->value, *end; *at; at = *end ? end + 1 : end) {
        unsigned long low = strtoul(at, &end, 16), high = 0;
        if (*end == '-') high = strtoul(end + 1, &end, 16);
        if ((*end && *end != ' ') || low > high || high > 0x10FFFF || (ranges->size && low <= ranges->at[ranges->size - 1].high)) bad_entry(e);
        ranges->at = resize(ranges->at, ranges->size + 1, sizeof(Range));
        ranges->at[ranges->size++] = (Range){(uint32_t)low, (uint32_t)high};
    }
}

static uint32_t hex(Entry *e, char **at) {
    char *end;
    unsigned long value = strtoul(*at, &end, 16);
    if (end == *at || value > 0x10FFFF) bad_entry(e);
    *at = end;
    return (uint32_t)value;
}

/* "c0=41+300 212b=c5 958=915.93c", ascending: `+` where the two compose, `.` where not */
static void entry_canonical(Entry *e, Tokenizer *t) {
    if (t->canonical) bad_entry(e);
    t->canonical = zeros(strlen(e->value) / 4 + 1, sizeof(Canonical)); /* an entry takes 4 bytes at least */
    t->composed = zeros(strlen(e->value) / 4 + 1, sizeof(Canonical));
    for (char *at = e->value; *at; at += *at == ' ') {
        Canonical c = {.code = hex(e, &at)};
        if (*at++ != '=' || (t->canonical_count && c.code <= t->canonical[t->canonical_count - 1].code)) bad_entry(e);
        c.first = hex(e, &at);
        c.composes = *at == '+';
        if (*at == '+' || *at == '.') at++, c.second = hex(e, &at);
        if (*at && *at != ' ') bad_entry(e);
        t->canonical[t->canonical_count++] = c;
        if (c.composes) t->composed[t->composed_count++] = c;
    }
    qsort(t->composed, t->composed_count, sizeof(Canonical), by_parts);
}

static void entry_marks(Entry *e, Tokenizer *t) { /* "300-314=e6 315=e8", ascending */
    if (t->marks) bad_entry(e);
    t->marks = zeros(strlen(e->value) / 3 + 1, sizeof(Marks));
    for (char *at = e->value; *at; at += *at == ' ') {
        Marks m;
        m.range.low = m.range.high = hex(e, &at);
        if (*at == '-') at++, m.range.high = hex(e, &at);
        if (*at++ != '=' || m.range.low > m.range.high || (t->marks_count && m.range.low <= t->marks[t->marks_count - 1].range.high)) bad_entry(e);
        m.class = (int)hex(e, &at);
        if (*at && *at != ' ') bad_entry(e);
        t->marks[t->marks_count++] = m;
    }
}

static void add_special(Tokenizer *t, int id, Str text) {
    t->specials = resize(t->specials, t->special_count + 1, sizeof(Special));
    t->specials[t->special_count++] = (Special){text, id};
    t->special_starts[(unsigned char)text.at[0]] = true;
}

static void entry_merge(Entry *e, Tokenizer *t) {
    int last = t->vocab_size - 1;
    uint64_t left = (uint64_t)entry_int(e, 0, last), pair = left << 32 | (uint64_t)entry_int(e, 0, last);
    int id = (int)entry_int(e, 0, last);
    if (!t->merges || t->merge_count >= t->merge_slots / 2) bad_entry(e);
    size_t slot = hash_pair(pair) % t->merge_slots;
    while (t->merges[slot].id >= 0 && t->merges[slot].pair != pair) slot = (slot + 1) % t->merge_slots;
    t->merges[slot] = (Merge){pair, (int)t->merge_count++, id};
}

static void read_entry(Entry *e, const char *key, Model *m, Tokenizer *t, Chat *chat) {
    struct {
        const char *key;
        bool *flag;
    } flags[] = {{"byte_level", &t->byte_level},      {"fuse_unk", &t->fuse_unk},           {"whole_words", &t->whole_words},
                 {"strip_space", &t->strip_space},    {"chat_system", &chat->takes_system}, {"chat_trim_system", &chat->trim_system},
                 {"chat_trim_user", &chat->trim_user}, {"chat_trim_answer", &chat->trim_answer},
                 {"prefix_unless_space", &t->prefix_unless_space}};
    struct {
        const char *key;
        Text *text;
    } texts[] = {{"chat_system_open", &chat->system_open}, {"chat_system_close", &chat->system_close}, {"chat_open", &chat->open},
                 {"chat_answer", &chat->answer},           {"chat_generate", &chat->generate},         {"chat_next", &chat->next}};

    for (size_t i = 0; i < sizeof flags / sizeof *flags; i++)
        if (strcmp(key, flags[i].key) == 0) {
            *flags[i].flag = entry_int(e, 0, 1) != 0;
            return;
        }
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++)
        if (strcmp(key, texts[i].key) == 0) {
            entry_text(e, texts[i].text);
            chat->available = true;
            return;
        }
    if (strcmp(key, "merge") == 0) entry_merge(e, t);
    else if (strcmp(key, "rope_theta") == 0) m->rope_theta = entry_float(e);
    else if (strcmp(key, "norm_eps") == 0) m->norm_eps = entry_float(e);
    else if (strcmp(key, "begin") == 0) entry_ids(e, &t->begin, t->vocab_size);
    else if (strcmp(key, "stop") == 0) entry_ids(e, &t->stop, t->vocab_size);
    else if (strcmp(key, "unk") == 0) t->unk = (int)entry_int(e, 0, t->vocab_size - 1);
    else if (strcmp(key, "split") == 0) t->split = (enum Split)entry_word(e, SPLITS, sizeof SPLITS / sizeof *SPLITS);
    else if (strcmp(key, "prefix") == 0) t->prefix = (enum Prefix)entry_word(e, PREFIXES, sizeof PREFIXES / sizeof *PREFIXES);
    else if (strcmp(key, "letters") == 0) entry_ranges(e, &t->letters);
    else if (strcmp(key, "numbers") == 0) entry_ranges(e, &t->numbers);
    else if (strcmp(key, "canonical") == 0) entry_canonical(e, t);
    else if (strcmp(key, "marks") == 0) entry_marks(e, t);
    else if (strcmp(key, "chat_unavailable") == 0) entry_text(e, &chat->reason);
    else if (strcmp(key, "merges") == 0 && !t->merges) {
        /* a merge takes a line of "merge 0 0 0" at least, so a damaged count cannot ask for more memory than its file accounts for */
        t->merge_slots = 2 * (size_t)entry_int(e, 0, (long)(e->file_size / 12)) + 3;
        t->merges = resize(NULL, t->merge_slots, sizeof(Merge));
        for (size_t i = 0; i < t->merge_slots; i++) t->merges[i].id = -1;
    } else if (strcmp(key, "special") == 0) {
        int id = (int)entry_int(e, 0, t->vocab_size - 1);
        t->hidden[id] = entry_int(e, 0, 1) != 0;
        Text text = {0};
        entry_text(e, &text);
        if (text.size == 0) bad_entry(e);
        add_special(t, id, (Str){text.at, text.size});
    } else bad_entry(e);
}

/* The model's own conventions; false where the file is absent. */
static bool load_runtime(const char *path, Model *m, Tokenizer *t, Chat *chat) {
    size_t size;
    const unsigned char *data = map_file(path, &size);
    if (!data) return false;
    char *text = resize(NULL, size + 1, 1);
    memcpy(text, data, size);
    munmap((void *)data, size);
    text[size] = 0;
    if (memchr(text, 0, size)) die("%s is damaged: it holds a zero byte", path);
    Entry e = {path, 0, NULL, size};
    for (char *line = text, *next; *line; line = next) {
        next = strchr(line, '\n');
        e.line++;
        if (!next) bad_entry(&e); /* every line ends, so a file cut short shows */
        *next++ = 0;
        if (e.line == 1) {
            if (strcmp(line, "llama2c-runtime 1") != 0) die("%s is not a llama2c-runtime 1 file", path);
            continue;
        }
        char *space = strchr(line, ' ');
        e.value = space ? space + 1 : line + strlen(line);
        if (space) *space = 0;
        if (strcmp(line, "end") == 0 && !*next) {
            free(text);
            return true;
        }
        read_entry(&e, line, m, t, chat);
    }
    die("%s is cut short", path);
}

static void llama2_conventions(Model *m, Tokenizer *t, Chat *chat, bool chatting) {
    struct {
        Text *to;
        const char *text;
    } pieces[] = {{&chat->system_open, "<s>[INST] <<SYS>>\n"}, {&chat->system_close, "\n<</SYS>>\n\n"}, {&chat->open, "<s>[INST] "},
                  {&chat->answer, " [/INST] "},              {&chat->generate, " [/INST]"},           {&chat->next, "</s><s>[INST] "}};
    for (size_t i = 0; i < sizeof pieces / sizeof *pieces; i++) append(pieces[i].to, pieces[i].text, strlen(pieces[i].text));
    chat->available = chat->takes_system = true;
    t->prefix = PREFIX_ALWAYS;
    t->strip_space = true;
    if (m->vocab_size < 3) die("a model without runtime.cfg needs <s> and </s> as tokens 1 and 2");
    push(&t->begin, 1);
    push(&t->stop, 1);
    push(&t->stop, 2);
    if (!chatting) return; /* llama2.c knows no special tokens in a raw prompt */
    add_special(t, 1, text_of("<s>"));
    add_special(t, 2, text_of("</s>"));
}

/* ---- running ---- */

typedef struct {
    Model model;
    Tokenizer tokenizer;
    Chat chat;
    Sampler sampler;
    Ids read;                     /* the tokens in the caches */
    int most;                     /* -n; 0: as many as the context takes */
    bool show_ids;                /* --answer-ids */
    bool ended;                   /* the answer, by a stop token */
    double prompt_time, text_time;
    size_t prompt_tokens, text_tokens;
} Session;

static bool stops(const Tokenizer *t, int id) {
    for (size_t i = 0; i < t->stop.size; i++)
        if (t->stop.at[i] == id) return true;
    return false;
}

/* Reads ids into the caches, keeping what they have in common with those read before. Returns the last one's logits. */
static float *read_prompt(Session *s, Ids ids) {
    double start = seconds();
    size_t common = 0;
    while (common + 1 < ids.size && common < s->read.size && ids.at[common] == s->read.at[common]) common++;
    s->read.size = common;
    float *logits = NULL;
    for (size_t i = common, n; i < ids.size; i += n) {
        n = ids.size - i < BATCH ? ids.size - i : BATCH;
        logits = forward(&s->model, ids.at + i, (int)n, (int)i, i + n == ids.size);
        for (size_t k = 0; k < n; k++) push(&s->read, ids.at[i + k]);
    }
    s->prompt_tokens += ids.size - common;
    s->prompt_time += seconds() - start;
    return logits;
}

static void check_prompt(const Session *s, Ids ids) {
    if (ids.size == 0) die("there is nothing to start from: this model has no BOS token, so give a prompt with -i");
    if (ids.size > (size_t)s->model.seq_len) die("the prompt has %zu tokens, the model takes %d", ids.size, s->model.seq_len);
}

/* Continues ids by at most `most` tokens up to a stop token, printing and adding to `said` as they come. */
static void write_text(Session *s, Ids ids, size_t most, bool opens, Text *said) {
    Tokenizer *t = &s->tokenizer;
    float *logits = read_prompt(s, ids);
    Text piece = {0};
    for (size_t i = 0; i < most; i++) {
        double start = seconds();
        int id = sample(&s->sampler, logits, s->model.vocab_size);
        if (s->show_ids) printf("%s%d", i ? " " : "", id);
        s->text_tokens++;
        if ((s->ended = stops(t, id))) break;
        piece.size = 0;
        decode(t, id, opens, &piece);
        if (piece.size) opens = false;
        if (!s->show_ids && piece.size) fwrite(piece.at, 1, piece.size, stdout);
        fflush(stdout);
        append(said, piece.at, piece.size);
        if (i + 1 == most) break;
        if (s->read.size == (size_t)s->model.seq_len) {
            fprintf(stderr, "\n[the context is full: %d tokens]\n", s->model.seq_len);
            break;
        }
        logits = forward(&s->model, &id, 1, (int)s->read.size, true);
        push(&s->read, id);
        s->text_time += seconds() - start;
    }
    free(piece.at);
}

static void generate(Session *s, Str prompt) {
    Ids ids = encode(&s->tokenizer, prompt, true);
    size_t limit = (size_t)s->model.seq_len, steps = s->most && (size_t)s->most < limit ? (size_t)s->most : limit;
    Text said = {0};
    check_prompt(s, ids);
    if (!s->show_ids) fwrite(prompt.at, 1, prompt.size, stdout);
    /* llama2.c's -n counts the tokens read, BOS and prompt among them, and prints one more */
    write_text(s, ids, steps + 1 > ids.size ? steps + 1 - ids.size : 0, prompt.size == 0, &said);
    putchar('\n');
}

static Str trimmed(Str s) {
    while (s.size && strchr(" \t\n\r\v\f", s.at[0])) s = (Str){s.at + 1, s.size - 1};
    while (s.size && strchr(" \t\n\r\v\f", s.at[s.size - 1])) s.size--;
    return s;
}

static void say(Text *talk, const Text *before, Str text, bool trim) {
    if (trim) text = trimmed(text);
    append(talk, before->at, before->size);
    append(talk, text.at, text.size);
}

static void open_talk(const Chat *chat, Text *talk, const char *system) {
    if (!chat->available) die("this model has no chat mode: %s", chat->reason.size ? chat->reason.at : "no template is known");
    if (!system) {
        append(talk, chat->open.at, chat->open.size);
        return;
    }
    if (!chat->takes_system) die("this model's chat template takes no system text");
    say(talk, &chat->system_open, text_of(system), chat->trim_system);
    append(talk, chat->system_close.at, chat->system_close.size);
}

/* One line of stdin without its newline; false at the end. */
static bool read_line(Text *line) {
    line->size = 0;
    int c;
    while ((c = getchar()) != EOF && c != '\n') append(line, &(char){(char)c}, 1);
    if (line->size && line->at[line->size - 1] == '\r') line->size--;
    append(line, "", 1);
    line->size--;
    return c != EOF || line->size;
}

/* The whole conversation is encoded anew for each turn, as transformers does; the caches keep what did not change. */
static void chat(Session *s, const char *system, const char *first) {
    const Chat *c = &s->chat;
    bool labels = isatty(STDIN_FILENO);
    Text talk = {0}, line = {0}, said = {0};
    open_talk(c, &talk, system);
    for (int turn = 0;; turn++) {
        Str user;
        if (turn == 0 && first) {
            user = text_of(first);
        } else {
            if (labels) fputs("User: ", stdout), fflush(stdout);
            if (!read_line(&line)) break;
            user = (Str){line.at, line.size};
        }
        say(&talk, turn ? &c->next : &(Text){0}, user, c->trim_user);
        size_t before = talk.size;
        append(&talk, c->generate.at, c->generate.size);
        Ids ids = encode(&s->tokenizer, (Str){talk.at, talk.size}, false);
        if (turn && ids.size >= (size_t)s->model.seq_len) {
            fprintf(stderr, "[the context is full: %d tokens]\n", s->model.seq_len);
            break;
        }
        check_prompt(s, ids);
        if (labels) fputs("Assistant: ", stdout);
        said.size = 0;
        write_text(s, ids, s->most ? (size_t)s->most : (size_t)s->model.seq_len, true, &said);
        putchar('\n');
        fflush(stdout);
        free(ids.at);
        talk.size = before;
        say(&talk, &c->answer, (Str){said.at, said.size}, c->trim_answer);
    }
    if (labels) putchar('\n');
}

static void print_ids(Ids ids) {
    for (size_t i = 0; i < ids.size; i++) printf("%s%d", i ? " " : "", ids.at[i]);
    putchar('\n');
}

/* The prompt's ids. In chat mode stdin's lines (with \n escapes) go on with the conversation: answer, user, answer, ... */
static Ids prompt_ids(Session *s, bool chatting, const char *system, Str prompt) {
    const Chat *c = &s->chat;
    Text talk = {0}, line = {0}, text = {0};
    if (!chatting) return encode(&s->tokenizer, prompt, true);
    open_talk(c, &talk, system);
    say(&talk, &(Text){0}, prompt, c->trim_user);
    for (bool answer = true; !isatty(STDIN_FILENO) && read_line(&line); answer = !answer) {
        if (!unescape(line.at, line.size, &text)) die("a line of the conversation has an unknown escape");
        say(&talk, answer ? &c->answer : &c->next, (Str){text.at, text.size}, answer ? c->trim_answer : c->trim_user);
    }
    append(&talk, c->generate.at, c->generate.size);
    return encode(&s->tokenizer, (Str){talk.at, talk.size}, false);
}

/* One answer, to the conversation that prompt_ids reads, and to stderr how it ended, for programs that hold the conversation themselves. */
static void reply(Session *s, const char *system, Str prompt) {
    Ids ids = prompt_ids(s, true, system, prompt);
    Text said = {0};
    check_prompt(s, ids);
    write_text(s, ids, s->most ? (size_t)s->most : (size_t)s->model.seq_len, true, &said);
    fprintf(stderr, "finish: %s %zu %zu\n", s->ended ? "stop" : "length", s->prompt_tokens, s->text_tokens);
}

static void report(const Session *s) {
    fprintf(stderr, "prompt: %zu tokens, %.1f tok/s; answer: %zu tokens, %.1f tok/s\n", s->prompt_tokens,
            s->prompt_time > 0 ? (double)s->prompt_tokens / s->prompt_time : 0, s->text_tokens,
            s->text_time > 0 ? (double)(s->text_tokens - 1) / s->text_time : 0);
}

__attribute__((noreturn)) static void usage(FILE *to) {
    fputs("run <model.bin> [options]\n"
          "  -m generate|chat  complete the prompt, or talk by the model's own chat template (default generate)\n"
          "  -i text           prompt; in chat mode the first message, the next ones being lines of stdin\n"
          "  -y text           system text (chat)\n"
          "  -n count          generate: tokens in all, the prompt's among them; chat: in each answer; 0 = most (default 256)\n"
          "  -t temperature    0 = greedy (default 1.0)\n"
          "  -p topp           0 or 1 = off (default 0.9)\n"
          "  -s seed           0 = from the clock (default)\n"
          "  -z path           tokenizer (default tokenizer.bin beside the model, else ./tokenizer.bin)\n"
          "  --ids             print the prompt's token ids and exit\n"
          "  --reply           chat: one answer to the conversation that stdin goes on with: answer, user, answer, ..., \\n for a new line\n"
          "  --answer-ids      print the ids of what is generated instead of its text\n",
          to);
    exit(to == stdout ? 0 : 1);
}

static double number(const char *option, const char *text, double least, double most) {
    char *end;
    double value = strtod(text, &end);
    if (end == text || *end || !(value >= least && value <= most)) die("%s takes a number from %g to %g, not '%s'", option, least, most, text);
    return value;
}

/* `name` in the folder of `path`. */
static char *beside(const char *path, const char *name) {
    const char *slash = strrchr(path, '/');
    Text text = {0};
    if (slash) append(&text, path, (size_t)(slash - path) + 1);
    append(&text, name, strlen(name) + 1);
    return text.at;
}

int main(int argc, char **argv) {
    Session s = {.most = 256, .sampler = {.temperature = 1.0f, .topp = 0.9f}};
    const char *model = NULL, *prompt = NULL, *system = NULL, *tokenizer = NULL;
    bool chatting = false, ids = false, one = false;
    for (int i = 1; i < argc; i++) {
        const char *a = argv[i];
        if (strcmp(a, "-h") == 0 || strcmp(a, "--help") == 0) usage(stdout);
        if (a[0] != '-') {
            if (model) die("more than one model: %s and %s", model, a);
            model = a;
        } else if (strcmp(a, "--ids") == 0) ids = true;
        else if (strcmp(a, "--reply") == 0) one = true;
        else if (strcmp(a, "--answer-ids") == 0) s.show_ids = true;
        else if (a[1] == 0 || a[2] != 0 || !strchr("mintpszy", a[1])) die("unknown option %s (try --help)", a);
        else if (++i == argc) die("%s takes a value", a);
        else if (a[1] == 'i') prompt = argv[i];
        else if (a[1] == 'y') system = argv[i];
        else if (a[1] == 'z') tokenizer = argv[i];
        else if (a[1] == 'n') s.most = (int)number(a, argv[i], 0, 1 << 30);
        else if (a[1] == 't') s.sampler.temperature = (float)number(a, argv[i], 0, 100);
        else if (a[1] == 'p') s.sampler.topp = (float)number(a, argv[i], 0, 1);
        else if (a[1] == 's') s.sampler.state = (uint64_t)number(a, argv[i], 0, 9007199254740992.0);
        else if (strcmp(argv[i], "chat") == 0) chatting = true;
        else if (strcmp(argv[i], "generate") == 0) chatting = false;
        else die("-m takes generate or chat, not '%s'", argv[i]);
    }
    if (!model) usage(stderr);
    if ((system || one) && !chatting) die("%s is for -m chat", one ? "--reply" : "-y");
    if (s.sampler.state == 0) s.sampler.state = (uint64_t)time(NULL);

    Model *m = &s.model;
    Tokenizer *t = &s.tokenizer;
    m->rope_theta = 10000.0f;
    m->norm_eps = 1e-5f;
    t->unk = -1;
    load_model(m, model);
    char *found = beside(model, "tokenizer.bin"), *runtime = beside(model, "runtime.cfg");
    if (!tokenizer) tokenizer = access(found, R_OK) == 0 ? found : "tokenizer.bin";
    load_tokenizer(t, tokenizer, m->vocab_size);
    if (!load_runtime(runtime, m, t, &s.chat)) llama2_conventions(m, t, &s.chat, chatting);
    set_frequencies(m);
    find_bytes(t);
    s.sampler.choices = zeros((size_t)m->vocab_size, sizeof(struct Choice));

    Str opening = text_of(prompt ? prompt : "");
    if (ids) print_ids(prompt_ids(&s, chatting, system, opening));
    else if (one) reply(&s, system, opening);
    else {
        if (chatting) chat(&s, system, prompt);
        else generate(&s, opening);
        report(&s);
    }
    return 0;
}
