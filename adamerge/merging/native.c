/* Both passes over the task vectors of many tensors, tile by tile (tiles.py); compiled and called by native.py.
 *
 * Threads take tiles from a common counter. Within a tile a few tasks are read side by side, as many streams as a core
 * reads ahead, and what lies between them stays in its first cache. Task vectors are widened in registers and added up
 * in float32. Every tile is computed alike whichever thread takes it.
 */
#include <pthread.h>
#include <stdint.h>
#include <string.h>

#define LANES 16 /* entries of a vector, which the compiler splits into what the CPU has */
#define WIDE 4   /* vectors that are added up together: enough to hide how long an addition takes */
#define TASKS 8  /* that are read side by side */
#define RUN 4    /* tiles that a thread takes at a time */
#define INLINE static inline __attribute__((always_inline))

typedef float vector __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef int16_t shorts __attribute__((vector_size(2 * LANES)));
typedef int32_t integers __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef int8_t bytes __attribute__((vector_size(LANES)));

enum { FLOAT32, BFLOAT16, FLOAT16, INT8 };

typedef struct {
    float *out; /* of ``contract``, the gradient */
    const float *base;
    const char *values;  /* (K, size) */
    const float *scales; /* (K, rows), or none */
    int64_t size, rows, aligned;
} Tensor;

typedef struct {
    int64_t tensor, start, stop, group, row;
} Tile;

typedef struct {
    const Tile *tiles;
    const Tensor *tensors;
    float *numbers; /* (K, columns): weights by group, or sums by tile */
    int64_t num_tiles, num_tasks, columns, next;
} Work;

INLINE int64_t width(int kind) { return kind == FLOAT32 ? 4 : kind == INT8 ? 1 : 2; }

/* IEEE half precision: the exponent moves from one bias to the other; what has none is a multiple of 2^-24. */
INLINE vector from_halves(halves given) {
    words all = __builtin_convertvector(given, words), size = all & 0x7fff;
    words normal = (size << 13) + ((uint32_t)(127 - 15) << 23) + ((words)(size >= 0x7c00) & (uint32_t)(128 - 16) << 23);
    words without = (words)(__builtin_convertvector((integers)size, vector) * 0x1p-24f), none = (words)(size < 0x400);
    return (vector)((none & without) | (~none & normal) | (all & 0x8000) << 16);
}

INLINE vector load(const char *from, int kind) {
    vector found;
    halves two;
    bytes one;
    switch (kind) {
    case FLOAT32:
        memcpy(&found, from, sizeof found);
        return found;
    case BFLOAT16:
        memcpy(&two, from, sizeof two);
        return (vector)(__builtin_convertvector(two, words) << 16);
    case FLOAT16:
        memcpy(&two, from, sizeof two);
        return from_halves(two);
    default:
        memcpy(&one, from, sizeof one);
        return __builtin_convertvector(__builtin_convertvector(__builtin_convertvector(one, shorts), integers), vector);
    }
}

/* The first entries only; zeros for the rest. */
INLINE vector load_some(const char *from, int kind, int64_t count) {
    char room[4 * LANES] = {0};
    memcpy(room, from, count * width(kind));
    return load(room, kind);
}

INLINE float sum(vector values) {
    for (int half = LANES / 2; half; half /= 2)
        for (int lane = 0; lane < half; lane++) values[lane] += values[lane + half];
    return values[0];
}

/* Where the task's entries of a tile begin. */
INLINE const char *at(const Tensor *tensor, const Tile *tile, int64_t task, int kind) {
    return tensor->values + (task * tensor->size + tile->start) * width(kind);
}

INLINE float scale(const Tensor *tensor, const Tile *tile, int64_t task) {
    return tensor->scales ? tensor->scales[task * tensor->rows + tile->row] : 1;
}

/* out[p] = base[p] + sum over k of weights[k, group] * values[k, p] */
INLINE void add(const Work *work, int64_t index, int kind) {
    const Tile *tile = work->tiles + index;
    const Tensor *tensor = work->tensors + tile->tensor;
    int64_t length = tile->stop - tile->start, step = width(kind);
    float room[BLOCK];
    const float *from = tensor->base + tile->start;
    for (int64_t first = 0; first < work->num_tasks; first += TASKS) {
        int64_t left = work->num_tasks - first, some = left < TASKS ? left : TASKS, i = 0;
        float *to = left > TASKS ? room : tensor->out + tile->start;
        float factors[TASKS];
        const char *values[TASKS];
        for (int64_t k = 0; k < some; k++) {
            factors[k] = scale(tensor, tile, first + k) * work->numbers[(first + k) * work->columns + tile->group];
            values[k] = at(tensor, tile, first + k, kind);
        }
        for (; i + WIDE * LANES <= length; i += WIDE * LANES) {
            vector totals[WIDE];
            memcpy(totals, from + i, sizeof totals);
            for (int64_t k = 0; k < some; k++)
                for (int j = 0; j < WIDE; j++) totals[j] += factors[k] * load(values[k] + (i + j * LANES) * step, kind);
            memcpy(to + i, totals, sizeof totals);
        }
        for (; i < length; i += LANES) {
            int64_t count = length - i < LANES ? length - i : LANES;
            vector totals = load_some((const char *)(from + i), FLOAT32, count);
            for (int64_t k = 0; k < some; k++) totals += factors[k] * load_some(values[k] + i * step, kind, count);
            memcpy(to + i, &totals, 4 * count);
        }
        from = to;
    }
}

/* sums[k, tile] = sum over p of values[k, p] * gradient[p] */
INLINE void contract(const Work *work, int64_t index, int kind) {
    const Tile *tile = work->tiles + index;
    const Tensor *tensor = work->tensors + tile->tensor;
    int64_t length = tile->stop - tile->start, step = width(kind);
    const char *gradient = (const char *)(tensor->out + tile->start);
    for (int64_t first = 0; first < work->num_tasks; first += TASKS) {
        int64_t last = work->num_tasks - 1, i = 0;
        const char *values[TASKS];
        vector totals[TASKS] = {0};
        for (int k = 0; k < TASKS; k++) /* those that are too many read what is read anyway */
            values[k] = at(tensor, tile, first + k < last ? first + k : last, kind);
        for (; i + LANES <= length; i += LANES) {
            vector factors = load(gradient + 4 * i, FLOAT32);
#pragma GCC unroll 8
            for (int k = 0; k < TASKS; k++) totals[k] += factors * load(values[k] + i * step, kind);
        }
        if (i < length) {
            vector factors = load_some(gradient + 4 * i, FLOAT32, length - i);
#pragma GCC unroll 8
            for (int k = 0; k < TASKS; k++) totals[k] += factors * load_some(values[k] + i * step, kind, length - i);
        }
        for (int k = 0; k < TASKS && first + k <= last; k++)
            work->numbers[(first + k) * work->columns + index] = scale(tensor, tile, first + k) * sum(totals[k]);
    }
}

#define PASS(name, kind)                                                                                               \
    static void *name##_##kind(void *given) {                                                                          \
        Work *work = given;                                                                                            \
        int64_t first;                                                                                                 \
        while ((first = __atomic_fetch_add(&work->next, RUN, __ATOMIC_RELAXED)) < work->num_tiles)                     \
            for (int64_t index = first; index < first + RUN && index < work->num_tiles; index++)                       \
                name(work, index, kind);                                                                               \
        return 0;                                                                                                      \
    }
#define PASSES(kind) PASS(add, kind) PASS(contract, kind)
PASSES(FLOAT32)
PASSES(BFLOAT16)
PASSES(FLOAT16)
PASSES(INT8)

static void *(*const PASS_OF[2][4])(void *) = {
    {add_FLOAT32, add_BFLOAT16, add_FLOAT16, add_INT8},
    {contract_FLOAT32, contract_BFLOAT16, contract_FLOAT16, contract_INT8},
};

void run(int pass, int kind, int num_threads, const Tile *tiles, int64_t num_tiles, const Tensor *tensors, float *numbers,
         int64_t num_tasks, int64_t columns) {
    Work work = {tiles, tensors, numbers, num_tiles, num_tasks, columns, 0};
    void *(*call)(void *) = PASS_OF[pass][kind];
    pthread_t others[num_threads];
    int started = 0;
    while (started + 1 < num_threads && !pthread_create(others + started, 0, call, &work)) started++;
    call(&work);
    while (started) pthread_join(others[--started], 0);
}
