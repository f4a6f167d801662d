/* Both passes over the task vectors of many tensors, tile by tile (tiles.py); compiled and called by native.py.
 *
 * Threads take tiles from a common counter. Within a tile a few tasks are read side by side, as many streams as a core
 * reads ahead, and what lies between them stays in its first cache. Task vectors are widened in registers and added up
 * in float32. Every tile is computed alike whichever thread takes it.
 *
 * Where groups are drawn entry by entry (Scattered in partition.py) they are drawn anew for a block at a time.
 */
#include <pthread.h>
#include <stdint.h>
#include <string.h>
#ifdef __F16C__
#include <immintrin.h>
#endif

/* Numbers of a vector: those that a register holds, since compilers spill wider ones. Of two vectors after one another:
 * every second number, and both taken in turn. */
#if defined __AVX512F__
#define LANES 16
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#define FIRST 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define LAST 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined __AVX2__
#define LANES 8
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define ODD 1, 3, 5, 7, 9, 11, 13, 15
#define FIRST 0, 8, 1, 9, 2, 10, 3, 11
#define LAST 4, 12, 5, 13, 6, 14, 7, 15
#else
#define LANES 4
#define EVEN 0, 2, 4, 6
#define ODD 1, 3, 5, 7
#define FIRST 0, 4, 1, 5
#define LAST 2, 6, 3, 7
#endif
#define WIDE 8  /* vectors that are added up together: enough to hide how long an addition takes */
#define TASKS 8 /* that are read side by side */
#define ADDED 4 /* tasks whose drawn groups' sums grow in turn, since each waits for its last addition */
#define RUN 4   /* tiles that a thread takes at a time */
#define INLINE static inline __attribute__((always_inline))
#ifdef __clang__
#define SHUFFLED(one, two, ...) __builtin_shufflevector(one, two, __VA_ARGS__)
#else
#define SHUFFLED(one, two, ...) __builtin_shuffle(one, two, (words){__VA_ARGS__})
#endif

typedef float vector __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef int32_t integers __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

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
    int64_t count; /* groups of a tensor */
    uint64_t salt;
} Draw;

typedef struct {
    const Tile *tiles;
    const Tensor *tensors;
    const Draw *draws; /* by tensor, or none */
    float *numbers;    /* (K, columns): weights by group, or sums by tile, of drawn groups by tile and group */
    int64_t num_tiles, num_tasks, columns, next;
} Work;

INLINE int width(int kind) { return kind == FLOAT32 ? 4 : kind == INT8 ? 1 : 2; }

/* Vectors that ``load`` fills. They share words of 32 bits: entry i of them comes into vector i % share(kind), and no
 * number has to move to another lane. The few float32 numbers that meet them are ordered alike instead. */
INLINE int share(int kind) { return kind == BFLOAT16 ? 2 : kind == INT8 ? 4 : 1; }

/* IEEE half precision: the exponent moves from one bias to the other; what has none is a multiple of 2^-24. */
INLINE vector from_halves(halves given) {
#if defined __F16C__ && LANES == 16
    return (vector)_mm512_cvtph_ps((__m256i)given);
#elif defined __F16C__ && LANES == 8
    return (vector)_mm256_cvtph_ps((__m128i)given);
#else
    words all = __builtin_convertvector(given, words), size = all & 0x7fff;
    words normal = (size << 13) + ((uint32_t)(127 - 15) << 23) + ((words)(size >= 0x7c00) & (uint32_t)(128 - 16) << 23);
    words without = (words)(__builtin_convertvector((integers)size, vector) * 0x1p-24f), none = (words)(size < 0x400);
    return (vector)((none & without) | (~none & normal) | (all & 0x8000) << 16);
#endif
}

INLINE void load(vector *found, const char *from, int kind) {
    words shared;
    halves given;
    switch (kind) {
    case FLOAT32:
        memcpy(found, from, sizeof *found);
        break;
    case FLOAT16:
        memcpy(&given, from, sizeof given);
        *found = from_halves(given);
        break;
    case BFLOAT16:
        memcpy(&shared, from, sizeof shared);
        found[0] = (vector)(shared << 16);
        found[1] = (vector)(shared & 0xffff0000);
        break;
    default:
        memcpy(&shared, from, sizeof shared);
        for (int i = 0; i < 4; i++)
            found[i] = __builtin_convertvector((integers)(shared << (24 - 8 * i)) >> 24, vector);
    }
}

/* ``count`` vectors of numbers after one another into the order of ``load``. (Copied one by one they stay in
 * registers.) */
INLINE void deal(vector *values, int count) {
    vector old[4];
    for (int done = 1; done < count; done *= 2) {
        for (int i = 0; i < count; i++) old[i] = values[i];
        for (int i = 0; i < count / 2; i++) {
            values[i] = SHUFFLED(old[2 * i], old[2 * i + 1], EVEN);
            values[count / 2 + i] = SHUFFLED(old[2 * i], old[2 * i + 1], ODD);
        }
    }
}

/* And back. */
INLINE void collect(vector *values, int count) {
    vector old[4];
    for (int done = 1; done < count; done *= 2) {
        for (int i = 0; i < count; i++) old[i] = values[i];
        for (int i = 0; i < count / 2; i++) {
            values[2 * i] = SHUFFLED(old[i], old[count / 2 + i], FIRST);
            values[2 * i + 1] = SHUFFLED(old[i], old[count / 2 + i], LAST);
        }
    }
}

/* Each vector's sum, one after another: neighbours are added up, in as few vectors as their sums fill. */
INLINE void add_up(vector *totals, float *sums) {
    int count = TASKS;
    for (int lanes = LANES; lanes > 1; lanes /= 2) {
        int both = count > 1;
        count = both ? count / 2 : 1;
        for (int i = 0; i < count; i++) {
            vector one = totals[i + both * i], two = totals[i + both * (i + 1)];
            totals[i] = SHUFFLED(one, two, EVEN) + SHUFFLED(one, two, ODD);
        }
    }
    memcpy(sums, totals, TASKS * sizeof *sums);
}

/* Where the task's entries of a tile begin. */
INLINE const char *at(const Tensor *tensor, const Tile *tile, int64_t task, int kind) {
    return tensor->values + (task * tensor->size + tile->start) * width(kind);
}

INLINE float scale(const Tensor *tensor, const Tile *tile, int64_t task) {
    return tensor->scales ? tensor->scales[task * tensor->rows + tile->row] : 1;
}

/* out[p] = base[p] + sum over k of factors[k] * values[k][p], for as many vectors as ``wide`` says */
INLINE void add_vectors(char *out, const char *base, const char *const *values, int64_t offset, const float *factors,
                        int64_t tasks, int wide, int kind) {
    int count = share(kind);
    vector totals[WIDE], found[4];
    memcpy(totals, base, wide * sizeof *totals);
    for (int i = 0; i < wide; i += count) deal(totals + i, count);
    for (int64_t k = 0; k < tasks; k++)
        for (int i = 0; i < wide; i += count) {
            load(found, values[k] + offset + i * LANES * width(kind), kind);
            for (int j = 0; j < count; j++) totals[i + j] += factors[k] * found[j];
        }
    for (int i = 0; i < wide; i += count) collect(totals + i, count);
    memcpy(out, totals, wide * sizeof *totals);
}

/* out[p] = base[p] + sum over k of weights[k, group] * values[k, p] */
INLINE void add(const Work *work, int64_t index, int kind) {
    const Tile *tile = work->tiles + index;
    const Tensor *tensor = work->tensors + tile->tensor;
    int64_t length = tile->stop - tile->start, step = width(kind), least = share(kind) * LANES;
    char room[4 * BLOCK], rest[16 * LANES] = {0}, few[TASKS][4 * LANES] = {0};
    const char *from = (const char *)(tensor->base + tile->start);
    for (int64_t first = 0; first < work->num_tasks; first += TASKS) {
        int64_t left = work->num_tasks - first, tasks = left < TASKS ? left : TASKS, i = 0;
        char *to = left > TASKS ? room : (char *)(tensor->out + tile->start);
        float factors[TASKS];
        const char *values[TASKS];
        for (int64_t k = 0; k < tasks; k++) {
            factors[k] = scale(tensor, tile, first + k) * work->numbers[(first + k) * work->columns + tile->group];
            values[k] = at(tensor, tile, first + k, kind);
        }
        for (; i + WIDE * LANES <= length; i += WIDE * LANES)
            add_vectors(to + 4 * i, from + 4 * i, values, i * step, factors, tasks, WIDE, kind);
        for (; i + least <= length; i += least)
            add_vectors(to + 4 * i, from + 4 * i, values, i * step, factors, tasks, share(kind), kind);
        if (i < length) {
            memcpy(rest, from + 4 * i, 4 * (length - i));
            for (int64_t k = 0; k < tasks; k++)
                values[k] = memcpy(few[k], values[k] + i * step, (length - i) * step);
            add_vectors(rest, rest, values, 0, factors, tasks, share(kind), kind);
            memcpy(to + 4 * i, rest, 4 * (length - i));
        }
        from = to;
    }
}

/* totals[k] += values[k][p] * gradient[p], for as many entries as ``load`` takes */
INLINE void contract_vectors(vector *totals, const char *gradient, const char *const *values, int64_t offset,
                             int kind) {
    int count = share(kind);
    vector factors[4], found[4];
    for (int i = 0; i < count; i++) memcpy(factors + i, gradient + i * sizeof *factors, sizeof *factors);
    deal(factors, count);
#pragma GCC unroll 8
    for (int k = 0; k < TASKS; k++) {
        load(found, values[k] + offset, kind);
        for (int j = 0; j < count; j++) totals[k] += factors[j] * found[j];
    }
}

/* sums[k, tile] = sum over p of values[k, p] * gradient[p] */
INLINE void contract(const Work *work, int64_t index, int kind) {
    const Tile *tile = work->tiles + index;
    const Tensor *tensor = work->tensors + tile->tensor;
    int64_t length = tile->stop - tile->start, step = width(kind), least = share(kind) * LANES;
    char rest[16 * LANES] = {0}, few[TASKS][4 * LANES] = {0};
    const char *gradient = (const char *)(tensor->out + tile->start);
    for (int64_t first = 0; first < work->num_tasks; first += TASKS) {
        int64_t last = work->num_tasks - 1, i = 0;
        const char *values[TASKS];
        vector totals[TASKS] = {0};
        for (int k = 0; k < TASKS; k++) /* those that are too many read what is read anyway */
            values[k] = at(tensor, tile, first + k < last ? first + k : last, kind);
        for (; i + least <= length; i += least) contract_vectors(totals, gradient + 4 * i, values, i * step, kind);
        if (i < length) {
            memcpy(rest, gradient + 4 * i, 4 * (length - i));
            for (int k = 0; k < TASKS; k++)
                values[k] = memcpy(few[k], values[k] + i * step, (length - i) * step);
            contract_vectors(totals, rest, values, 0, kind);
        }
        float sums[TASKS];
        add_up(totals, sums);
        for (int k = 0; k < TASKS && first + k <= last; k++)
            work->numbers[(first + k) * work->columns + index] = scale(tensor, tile, first + k) * sums[k];
    }
}

/* Numbers after one another; ``to`` has room for as many more as ``load`` takes. */
INLINE void widen(float *to, const char *from, int64_t length, int kind) {
    int count = share(kind), step = width(kind);
    char few[4 * LANES] = {0};
    vector found[4];
    for (int64_t i = 0; i < length; i += count * LANES) {
        const char *here = from + i * step;
        if (i + count * LANES > length) here = memcpy(few, here, (length - i) * step);
        load(found, here, kind);
        collect(found, count);
        memcpy(to + i, found, count * sizeof *found);
    }
}

/* What is left of a tile from ``start``, but no more than a block nor, where rows have scales, than a row. */
INLINE Tile strip(const Work *work, const Tile *tile, int64_t start) {
    const Tensor *tensor = work->tensors + tile->tensor;
    int64_t stop = start + BLOCK < tile->stop ? start + BLOCK : tile->stop, row = 0;
    if (tensor->scales) {
        int64_t columns = tensor->size / tensor->rows;
        row = start / columns;
        stop = stop < (row + 1) * columns ? stop : (row + 1) * columns;
    }
    return (Tile){tile->tensor, start, stop, tile->group, row};
}

/* Which of the tensor's groups each entry is of, as Scattered.groups has it. x % count is the upper half of
 * (x * (2^64 / count) mod 2^64) * count for an x of 32 bits (Lemire, Kaser and Kurz, 2019). */
INLINE void draw(uint32_t *groups, const Work *work, const Tile *part) {
    const Draw *drawn = work->draws + part->tensor;
    uint64_t inverse = UINT64_MAX / drawn->count + 1;
    for (int64_t i = part->start; i < part->stop; i++) {
        uint64_t mixed = i * 0x9E3779B97F4A7C15u + drawn->salt;
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9u;
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EBu;
        mixed = (mixed ^ mixed >> 31) >> 32;
        groups[i - part->start] = (unsigned __int128)(inverse * mixed) * drawn->count >> 64;
    }
}

/* ``add`` where groups are drawn */
INLINE void add_drawn(const Work *work, int64_t index, int kind) {
    const Tile *tile = work->tiles + index;
    const Tensor *tensor = work->tensors + tile->tensor;
    float totals[BLOCK], found[BLOCK + 4 * LANES];
    uint32_t groups[BLOCK];
    for (int64_t start = tile->start; start < tile->stop;) {
        Tile part = strip(work, tile, start);
        int64_t length = part.stop - start;
        draw(groups, work, &part);
        memcpy(totals, tensor->base + start, length * sizeof *totals);
        for (int64_t k = 0; k < work->num_tasks; k++) {
            const float *weights = work->numbers + k * work->columns + tile->group;
            float factor = scale(tensor, &part, k);
            widen(found, at(tensor, &part, k, kind), length, kind);
            for (int64_t i = 0; i < length; i++) totals[i] += factor * weights[groups[i]] * found[i];
        }
        memcpy(tensor->out + start, totals, length * sizeof *totals);
        start = part.stop;
    }
}

/* sums[k, groups[i]] += found[k][i] */
INLINE void scatter(float *sums, int64_t stride, const uint32_t *groups, float (*found)[BLOCK + 4 * LANES],
                    int64_t length, int64_t tasks) {
    for (int64_t i = 0; i < length; i++)
#pragma GCC unroll 4
        for (int64_t k = 0; k < tasks; k++) sums[k * stride + groups[i]] += found[k][i];
}

/* sums[k, tile, group] = sum over those p of the tile that are of the group of values[k, p] * gradient[p] */
INLINE void contract_drawn(const Work *work, int64_t index, int kind) {
    const Tile *tile = work->tiles + index;
    const Tensor *tensor = work->tensors + tile->tensor;
    int64_t count = work->columns / work->num_tiles;
    float *sums = work->numbers + index * count, found[ADDED][BLOCK + 4 * LANES];
    uint32_t groups[BLOCK];
    for (int64_t k = 0; k < work->num_tasks; k++) memset(sums + k * work->columns, 0, count * sizeof *sums);
    for (int64_t start = tile->start; start < tile->stop;) {
        Tile part = strip(work, tile, start);
        int64_t length = part.stop - start;
        draw(groups, work, &part);
        for (int64_t first = 0; first < work->num_tasks; first += ADDED) {
            int64_t left = work->num_tasks - first, tasks = left < ADDED ? left : ADDED;
            for (int64_t k = 0; k < tasks; k++) {
                float factor = scale(tensor, &part, first + k);
                widen(found[k], at(tensor, &part, first + k, kind), length, kind);
                for (int64_t i = 0; i < length; i++) found[k][i] *= factor * tensor->out[start + i];
            }
            float *of_tasks = sums + first * work->columns;
            if (tasks == ADDED)
                scatter(of_tasks, work->columns, groups, found, length, ADDED);
            else
                scatter(of_tasks, work->columns, groups, found, length, tasks);
        }
        start = part.stop;
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
#define PASSES(kind) PASS(add, kind) PASS(contract, kind) PASS(add_drawn, kind) PASS(contract_drawn, kind)
PASSES(FLOAT32)
PASSES(BFLOAT16)
PASSES(FLOAT16)
PASSES(INT8)

#define OF(name) {name##_FLOAT32, name##_BFLOAT16, name##_FLOAT16, name##_INT8}
static void *(*const PASS_OF[2][2][4])(void *) = {{OF(add), OF(contract)}, {OF(add_drawn), OF(contract_drawn)}};

void run(int pass, int kind, int num_threads, const Tile *tiles, int64_t num_tiles, const Tensor *tensors,
         const Draw *draws, float *numbers, int64_t num_tasks, int64_t columns) {
    Work work = {tiles, tensors, draws, numbers, num_tiles, num_tasks, columns, 0};
    void *(*call)(void *) = PASS_OF[draws != 0][pass][kind];
    pthread_t others[num_threads];
    int started = 0;
    while (started + 1 < num_threads && !pthread_create(others + started, 0, call, &work)) started++;
    call(&work);
    while (started) pthread_join(others[--started], 0);
}
