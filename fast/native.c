/*
A decode step of BitSkip in one C file: token ids in, logits out. native.py builds it, packs the
weights, draws how they lie in memory, fills in the structures below, and calls it.

With one text a step is a few hundred products of a matrix with one vector. Each takes microseconds,
but so does every call from Python. So here the whole step is one call. What remains is what has to
be: reading every weight once. There ternary weights pay, with 2 bits each instead of 32.

    tokens -> embedding -> h (T, C)                            T = 1, or a few new tokens at once
    for each block:  h += o(norm?(attention(qkv(norm(h)))))    keys and values join the cache
                     h += down(norm?(relu(u)^2 or silu(g) u))  u, or g and u, = up(norm(h))
    logits = head(norm(h))                                     after the last block, or at an exit

A ternary linear quantizes its input to int8 codes q with one scale, as quant.py does. x86
multiplies unsigned bytes with signed ones. So weights are stored as w + 1 in {0, 1, 2}:
sum_k (w_k + 1) q_k - sum_k q_k is exact in int32.

Numbers. The same position gives the same bits, whatever the number of threads, the instruction set,
and how many tokens share the call. Integers are exact. Each sum of floats has one fixed order (16
lanes, folded by halves), and the compiler may not reorder it or fuse products into it
(-ffp-contract=off).

The head. Of the 8 bits of a weight the upper 4 tell which words are likely. They are read for all
words, and all 8 bits for the words within Decoder.margin of the likeliest.

Threads. One of them leads: it runs the step as it is written below. Where there are many rows or
heads, it lays them out in pieces for all to take. It never waits for a thread that has taken none.
So on a busy machine, where helpers do not get to run, a step takes what it takes on one thread.
*/
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

enum { LANES = 16 };                // partial sums of a sum of floats; rows in a block of weights
enum { GROUP = 8 };                 // tokens that a kernel multiplies at a time, at most
enum { CHUNK = 16 };                // tokens that share one reading of the weights
enum { QUERIES = 2 };               // queries that share one reading of keys and values
enum { AHEAD = 4096 };              // bytes: the next weights come while these are in use
enum { SOME = 256 };                // logits of which exponentials are held at a time
enum { NONE, LAYERNORM, RMSNORM };  // norms
enum { PLAIN, RELU2, SWIGLU };      // the input of a linear: as it is, or `down`'s
enum { FULL, GATE, CONFIDENCE };  // who may leave before the last block

// -----------------------------------------------------------------------------------------------
// what native.py fills in. C: n_embd, D: C / n_head, V: vocab_size, n 16s: n up to a multiple of 16

typedef struct {               // y = W Q(FWHT?(norm?(norm?(activation?(x)))))
    const uint8_t *weights;    // (rows 16s / 16, cols 16s / 16, 32 w_bits)
    const int8_t *codes;       // (rows, cols): all 8 bits of the head's, where w_bits is 4
    const float *scales;       // (rows 16s) of the weights, 0 in the padding
    const float *norm_weight;  // (inputs) of the norm in front of this linear; NULL: there is none
    int rows, inputs, cols;    // cols: inputs, or the next power of two where it is transformed
    int w_bits, bits;          // of a weight: 2 (ternary) or 4 (the head); of an input
    int activation, norm, linear_norm, hadamard;  // norm: in front; linear_norm: inside
} Linear;

typedef struct {
    Linear qkv, o, up, down;     // q, k and v are one matrix; so are SwiGLU's gate and up
    const float *gate1, *gate2;  // (gate_dim, C), (gate_dim) of A6; neither is in the last block
} Block;

typedef struct {
    Linear head;
    const Block *blocks;            // (n_layer)
    const int8_t *embedding;        // (V, C)
    const float *embedding_scales;  // (V)
    const float *cos, *sin;         // (block_size, D / 2) of RoPE
    float *k;                       // (n_layer, n_kv_head, block_size 16s / 16, D, 16)
    float *v;                       // (n_layer, n_kv_head, block_size, D 16s)
    char *workspace;                // bitskip_workspace() bytes
    int n_layer, n_head, n_kv_head, n_embd, vocab_size, block_size, gate_dim, normed_exits;
    int threads, isa;
    float margin;                   // logits that are not further from the largest are exact
} Decoder;

typedef struct {
    const int64_t *tokens;  // (T), or NULL: h is given
    float *h, *logits;      // (T, C 16s), in and out; (n_logits, V), of the last of them
    int T, start;           // so many tokens, at the positions from start on,
    int first, last;        // through blocks first ... last
    int n_logits, exit_mode;  // other than FULL it is for T = 1
    float threshold;
    int exit_layer;         // out: the block after which the last token left
} Step;

typedef struct {          // a pass of speculate.py
    int64_t *tokens;      // (T + most): T new ones in; behind them the drafts, out
    float *h;             // (T + most, C 16s), out
    float *q, *p;         // out: logits (most, V) that drafts were drawn from, and full depth's
    const float *random;  // (most), uniform in 0 ... 1
    int T, start, layer, most;      // blocks 0 ... layer draft so many tokens, at most,
    float temperature, confidence;  // and stop where the likeliest is less probable than that
    int n;                // out: how many drafts there are; p is (n + 1, V)
} Draft;

static int up_to(int multiple, int n) { return (n + multiple - 1) / multiple * multiple; }
static int larger(int a, int b) { return a > b ? a : b; }
static int smaller(int a, int b) { return a < b ? a : b; }
#define INLINE static inline __attribute__((always_inline))

// -----------------------------------------------------------------------------------------------
// sums. Loops over LANES become vector instructions: 16 floats are one register of AVX-512

typedef float Lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));  // anywhere

static float fold(float *lanes) {
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

static float sum(const float *x, int n) {
    float lanes[LANES] = {0};
    int i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int l = 0; l < LANES; l++) lanes[l] += x[i + l];
    for (int l = 0; i + l < n; l++) lanes[l] += x[i + l];
    return fold(lanes);
}

static float dot(const float *x, const float *y, int n) {
    float lanes[LANES] = {0};
    int i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int l = 0; l < LANES; l++) lanes[l] += x[i + l] * y[i + l];
    for (int l = 0; i + l < n; l++) lanes[l] += x[i + l] * y[i + l];
    return fold(lanes);
}

static int32_t bits_of(float x) { int32_t bits; memcpy(&bits, &x, sizeof bits); return bits; }
static float float_of(int32_t bits) { float x; memcpy(&x, &bits, sizeof x); return x; }

// max x, by comparing integers, which vectorises: floats order as their bits do, once those of the
// negative ones are turned over (all but the sign).
static float max(const float *x, int n) {
    int32_t largest = INT32_MIN;
    for (int i = 0; i < n; i++) {
        int32_t bits = bits_of(x[i]), key = bits ^ ((bits >> 31) & INT32_MAX);
        largest = key > largest ? key : largest;
    }
    return float_of(largest ^ ((largest >> 31) & INT32_MAX));
}

static float max_abs(const float *x, int n) {
    int32_t largest = 0;
    for (int i = 0; i < n; i++) {
        int32_t bits = bits_of(x[i]) & INT32_MAX;
        largest = bits > largest ? bits : largest;
    }
    return float_of(largest);
}

// x rounded to an integer, ties to even, for |x| < 2^22: x + 1.5 2^23 has no bit for a fraction.
static const float MAGIC = 12582912.0f;
static int32_t nearest(float x) { return bits_of(x + MAGIC) - bits_of(MAGIC); }

// e^x = 2^n e^r, n an integer and |r| <= ln(2) / 2, to 2 units in the last place. It vectorises.
static float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float n = (x * 1.44269504f + MAGIC) - MAGIC;
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return (p * r * r + r + 1) * float_of((int32_t)((uint32_t)(nearest(n) + 127) << 23));
}

// -----------------------------------------------------------------------------------------------
// the input of a linear

typedef struct {  // of one token, as the product reads it: a cache line, and the codes behind it
    float scale;
    int32_t sum;    // of the codes
    char line[56];
    int8_t data[];  // (X) (With a size here, GCC 14 took it at its word and forgot the zeros.)
} Slot;

// The FFN's non-linearity: relu(up)^2, or silu(gate) up where `in` holds gate (n) and up (n).
static void activate(const float *restrict in, int n, int activation, float *restrict x) {
    if (activation == PLAIN) memcpy(x, in, n * sizeof *x);
    if (activation == RELU2)
        for (int i = 0; i < n; i++) x[i] = in[i] > 0 ? in[i] * in[i] : 0;
    if (activation == SWIGLU) {
        for (int i = 0; i < n; i++) x[i] = exponential(-in[i]);
        for (int i = 0; i < n; i++) x[i] = in[i] / (1 + x[i]) * in[n + i];
    }
}

// x = norm(x), times weight unless that is NULL.
static void normalize(float *restrict x, const float *restrict weight, int n, int kind, float eps) {
    float mean = kind == LAYERNORM ? sum(x, n) / n : 0;
    for (int i = 0; i < n; i++) x[i] -= mean;
    float r = 1 / sqrtf(dot(x, x, n) / n + eps);
    for (int i = 0; i < n; i++) x[i] *= r;
    for (int i = 0; weight && i < n; i++) x[i] *= weight[i];
}

// (a, b) = (a + b, a - b).
static void butterfly(float *restrict a, float *restrict b, int n) {
    for (int i = 0; i < n; i++) {
        float top = a[i], bottom = b[i];
        a[i] = top + bottom, b[i] = top - bottom;
    }
}

// The same within a run of 16, between entries `half` apart: a shuffle and a sum.
INLINE void butterfly_within(float *run, const int half) {
    float y[LANES];
    for (int l = 0; l < LANES; l++)
        y[l] = l & half ? run[l ^ half] - run[l] : run[l ^ half] + run[l];
    memcpy(run, y, sizeof y);
}

// x = H_n x (B4), in place. For n < 16 there are zeros behind x, up to 16.
static void fwht(float *x, int n) {
    float scale = (float)(1 / sqrt(n));
    for (int i = 0; i < n; i++) x[i] *= scale;
    for (int half = LANES; half < n; half *= 2)
        for (int i = 0; i < n; i += 2 * half) butterfly(x + i, x + i + half, half);
    for (int i = 0; i < n; i += LANES) {
        if (n > 1) butterfly_within(x + i, 1);
        if (n > 2) butterfly_within(x + i, 2);
        if (n > 4) butterfly_within(x + i, 4);
        if (n > 8) butterfly_within(x + i, 8);
    }
}

// A2: codes, their scale and their sum; zeros behind them up to a whole block.
static void quantize(const float *x, int n, int bits, Slot *slot) {
    int q = (1 << (bits - 1)) - 1;
    float s = max_abs(x, n), scale = (s < 1e-20f ? 1e-20f : s) / q;
    int32_t total = 0;
    for (int i = 0; i < n; i++) {
        int32_t code = nearest(x[i] / scale);
        slot->data[i] = (int8_t)code;
        total += code;
    }
    memset(slot->data + n, 0, up_to(LANES, n) - n);
    slot->scale = scale, slot->sum = total;
}

// -----------------------------------------------------------------------------------------------
// kernels: sums[t][r] = sum_k w[r][k] x[t][k] in exact int32, of 16 rows r and n <= GROUP tokens t.
// Weights come 16 columns at a time: 64 bytes of 2-bit ones, 128 of 4-bit ones, as native.py draws.
// The 4-byte lane r of each 64 bytes belongs to row r, so nothing is ever summed across lanes.

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "native.c is for little-endian machines: byte 0 of a lane is its lowest"
#endif
typedef int32_t Sums[LANES];
typedef void Kernel(const uint8_t *w, int blocks, const int8_t *const *x, int n, int bits,
                    Sums *sums);
typedef uint32_t Rows __attribute__((vector_size(4 * LANES)));

static void kernel_portable(const uint8_t *w, int blocks, const int8_t *const *x, int n, int bits,
                            Sums *sums) {
    for (int t = 0; t < n; t++) {
        Rows rows, total = {0};
        for (int b = 0; b < blocks; b++)
            for (int s = 0; s < 4; s++) {  // columns 16 b + 4 s + j
                memcpy(&rows, w + 64 * (b * bits / 2 + s * bits / 8), sizeof rows);
                rows = rows >> bits * s % 8 & (bits == 2 ? 0x03030303 : 0x0f0f0f0f);
                for (int j = 0; j < 4; j++)
                    total += (rows >> 8 * j & 255) * (uint32_t)x[t][16 * b + 4 * s + j];
            }
        memcpy(sums[t], &total, sizeof total);
    }
}

#ifdef __x86_64__
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))

typedef int32_t Four __attribute__((aligned(1), may_alias));  // bytes

// vpdpbusd: every int32 lane += its four unsigned bytes times the four signed ones. `ways` sums a
// token are under way at once: enough to hide the latency, few enough for the registers.
AVX512 INLINE void multiply_512(const uint8_t *w, int blocks, const int8_t *const *x, const int n,
                                const int bits, Sums *sums) {
    const int ways = n > 2 ? 2 : 4;
    __m512i total[GROUP][4], mask = _mm512_set1_epi8((1 << bits) - 1);
    for (int t = 0; t < n; t++)
        for (int s = 0; s < ways; s++) total[t][s] = _mm512_setzero_si512();
    for (int b = 0; b < blocks; b++)
        for (int s = 0; s < 4; s++) {
            const uint8_t *bytes = w + 64 * (b * bits / 2 + s * bits / 8);
            if (bits * s % 8 == 0) __builtin_prefetch(bytes + AHEAD);
            __m512i rows = _mm512_loadu_si512(bytes);
            rows = _mm512_and_si512(_mm512_srli_epi16(rows, bits * s % 8), mask);
            for (int t = 0; t < n; t++) {
                __m512i q = _mm512_set1_epi32(*(const Four *)(x[t] + 16 * b + 4 * s));
                total[t][s % ways] = _mm512_dpbusd_epi32(total[t][s % ways], rows, q);
            }
        }
    for (int t = 0; t < n; t++) {
        for (int s = 1; s < ways; s++) total[t][0] = _mm512_add_epi32(total[t][0], total[t][s]);
        _mm512_storeu_si512(sums[t], total[t][0]);
    }
}

// Without VNNI, 8 rows at a time. The product of unsigned and signed bytes sums pairs of them in
// int16. That is enough for 16 blocks of ternary weights (64 sums of at most 508), and 2 of 4 bits.
AVX2 INLINE void multiply_256(const uint8_t *w, int blocks, const int8_t *const *x, const int n,
                              const int bits, Sums *sums) {
    const __m256i mask = _mm256_set1_epi8((1 << bits) - 1), ones = _mm256_set1_epi16(1);
    for (int half = 0; half < 2; half++) {
        __m256i total[GROUP], pairs[GROUP];
        for (int t = 0; t < n; t++) total[t] = _mm256_setzero_si256();
        for (int b = 0, stop; b < blocks;) {
            for (int t = 0; t < n; t++) pairs[t] = _mm256_setzero_si256();
            for (stop = smaller(blocks, b + (bits == 2 ? 16 : 2)); b < stop; b++)
                for (int s = 0; s < 4; s++) {
                    const uint8_t *bytes = w + 64 * (b * bits / 2 + s * bits / 8) + 32 * half;
                    if (bits * s % 8 == 0) __builtin_prefetch(bytes + AHEAD);
                    __m256i rows = _mm256_loadu_si256((const __m256i *)bytes);
                    rows = _mm256_and_si256(_mm256_srli_epi16(rows, bits * s % 8), mask);
                    for (int t = 0; t < n; t++) {
                        __m256i q = _mm256_set1_epi32(*(const Four *)(x[t] + 16 * b + 4 * s));
                        pairs[t] = _mm256_add_epi16(pairs[t], _mm256_maddubs_epi16(rows, q));
                    }
                }
            for (int t = 0; t < n; t++)
                total[t] = _mm256_add_epi32(total[t], _mm256_madd_epi16(pairs[t], ones));
        }
        for (int t = 0; t < n; t++) _mm256_storeu_si256((__m256i *)(sums[t] + 8 * half), total[t]);
    }
}

// n and bits as constants, so that the loops unroll and the sums stay in registers.
#define BY_BITS(multiply, n) \
    (bits == 2 ? multiply(w, blocks, x, n, 2, sums) : multiply(w, blocks, x, n, 4, sums))
AVX512 static void kernel_avx512(const uint8_t *w, int blocks, const int8_t *const *x, int n,
                                 int bits, Sums *sums) {
    n > 4 ? BY_BITS(multiply_512, 8) : n > 2 ? BY_BITS(multiply_512, 4) :
    n > 1 ? BY_BITS(multiply_512, 2) : BY_BITS(multiply_512, 1);
}

AVX2 static void kernel_avx2(const uint8_t *w, int blocks, const int8_t *const *x, int n, int bits,
                             Sums *sums) {
    if (n > 4) kernel_avx2(w, blocks, x + 4, n - 4, bits, sums + 4);
    n > 2 ? BY_BITS(multiply_256, 4) : n > 1 ? BY_BITS(multiply_256, 2) : BY_BITS(multiply_256, 1);
}
#endif

// -----------------------------------------------------------------------------------------------
// a step under way, and the team that shares its work

typedef struct Run Run;
typedef void Task(Run *run, int piece, float *scratch);

struct Run {
    const Decoder *d;
    int C, Q, F, X;                  // row lengths, multiples of 16: of h and y, qkv, ffn, scratch
    float *qkv, *y, *ffn, *scratch;  // (CHUNK, .); scratch (threads, X)
    char *slots;                     // (CHUNK, slot_bytes)
    int64_t slot_bytes;
    int T, start, layer;             // tokens at hand, position of the first, block
    int has_left;                    // has the (only) token left?
    Task *task;                      // what is shared out, and in how many pieces
    int pieces;
    const Linear *L;                 // of a product: what of
    const float *in;
    float *out;
    int in_stride, out_stride, add;
    float least[CHUNK];              // what is worth refining
};

// What is on offer is one number, so that taking a piece is one atomic operation. It can only
// succeed while there are pieces. While a piece is not done, the Run that it belongs to stays.
static struct {
    _Alignas(64) atomic_uint offer;      // threads that it is for << 16 | pieces that are left
    _Alignas(64) atomic_int unfinished;  // pieces that are not done yet
    _Alignas(64) Run *run;
    pthread_mutex_t leading, lock;       // one step at a time; `lock` is for what follows
    pthread_cond_t begin;
    int steps, helpers;                  // steps begun; helpers there are
} team = {.leading = PTHREAD_MUTEX_INITIALIZER, .lock = PTHREAD_MUTEX_INITIALIZER,
          .begin = PTHREAD_COND_INITIALIZER};

// Take pieces, and do them, until none is left. Returns how many. id: 0 is the leader.
static int take_pieces(unsigned id) {
    int n = 0;
    unsigned offer = atomic_load_explicit(&team.offer, memory_order_acquire);
    while (id < offer >> 16 && (offer & 0xffff)) {
        if (!atomic_compare_exchange_weak_explicit(
                &team.offer, &offer, offer - 1, memory_order_acq_rel, memory_order_acquire))
            continue;  // not the first: look again
        Run *run = team.run;
        run->task(run, (int)(offer & 0xffff) - 1, run->scratch + (int64_t)run->X * id);
        atomic_fetch_sub_explicit(&team.unfinished, 1, memory_order_release);
        offer = atomic_load_explicit(&team.offer, memory_order_acquire);
        n++;
    }
    return n;
}

static void idle(int spins) {
    if (spins >= 1000) sched_yield();  // 20 microseconds: who we wait for may need this very core
#ifdef __x86_64__
    else __builtin_ia32_pause();
#endif
}

// Do a task of so many pieces, with the help of who comes.
static void share_out(Run *run, Task *task, int pieces) {
    run->task = task, run->pieces = pieces, team.run = run;
    if (pieces == 1) return task(run, 0, run->scratch);
    atomic_store_explicit(&team.unfinished, pieces, memory_order_relaxed);
    unsigned offer = (unsigned)run->d->threads << 16 | (unsigned)pieces;
    atomic_store_explicit(&team.offer, offer, memory_order_release);
    take_pieces(0);
    for (int spins = 0; atomic_load_explicit(&team.unfinished, memory_order_acquire); spins++)
        idle(spins);
}

// A helper's life: it wakes when a step begins, and sleeps when there has been nothing to do for
// some 0.3 ms, which outlasts the pause between two steps.
static void *help(void *id) {
    for (int seen = 0;;) {
        pthread_mutex_lock(&team.lock);
        while (team.steps == seen) pthread_cond_wait(&team.begin, &team.lock);
        seen = team.steps;
        pthread_mutex_unlock(&team.lock);
        for (int spins = 0; spins < 1200; spins++) {
            if (take_pieces((unsigned)(intptr_t)id)) spins = 0;
            idle(spins);
        }
    }
    return NULL;
}

static void wake_helpers(int threads) {
    pthread_t thread;
    pthread_mutex_lock(&team.lock);
    for (intptr_t id = team.helpers + 1; id < threads; id++) {
        if (pthread_create(&thread, NULL, help, (void *)id)) break;
        pthread_detach(thread);
        team.helpers++;
    }
    team.steps++;
    pthread_cond_broadcast(&team.begin);
    pthread_mutex_unlock(&team.lock);
}

// Lay the buffers out in the workspace, once there is one. Returns its size in bytes.
static int64_t lay_out(const Decoder *d, Run *run) {
    const Block *b = d->blocks;
    int C = up_to(LANES, d->n_embd), Q = up_to(LANES, b->qkv.rows), F = up_to(LANES, b->up.rows);
    int X = larger(larger(b->qkv.cols, b->o.cols), b->down.cols);
    X = up_to(LANES, larger(X, QUERIES * up_to(LANES, d->block_size)));
    int64_t shared = (int64_t)CHUNK * (Q + C + F), floats = shared + (int64_t)d->threads * X;
    *run = (Run){.d = d, .C = C, .Q = Q, .F = F, .X = X, .slot_bytes = 64 + up_to(64, X)};
    if (d->workspace) {
        run->qkv = (float *)d->workspace;
        run->y = run->qkv + CHUNK * Q, run->ffn = run->y + CHUNK * C;
        run->scratch = run->qkv + shared;
        run->slots = (char *)(run->qkv + floats);
    }
    return floats * sizeof(float) + CHUNK * run->slot_bytes;
}

static Slot *slot(const Run *run, int t) { return (Slot *)(run->slots + t * run->slot_bytes); }

// -----------------------------------------------------------------------------------------------
// tasks

// The input of token t, to its slot, by way of x.
INLINE void prepare(Run *run, int t, float *x) {
    const Linear *L = run->L;
    int n = L->inputs;
    activate(run->in + (int64_t)t * run->in_stride, n, L->activation, x);
    if (L->norm_weight) normalize(x, L->norm_weight, n, L->norm, 1e-5f);
    float eps = L->linear_norm == RMSNORM ? 0x1p-23f : 1e-5f;  // PyTorch's defaults
    if (L->linear_norm) normalize(x, NULL, n, L->linear_norm, eps);
    if (L->hadamard) {
        memset(x + n, 0, (up_to(LANES, L->cols) - n) * sizeof *x);
        fwht(x, L->cols);
    }
    quantize(x, L->cols, L->bits, slot(run, t));
}

// Rows 16 i ... 16 i + 15 of the product, for tokens t ... t + GROUP - 1.
INLINE void multiply_rows(Run *run, int i, int t, Kernel *kernel) {
    const Linear *L = run->L;
    int blocks = up_to(LANES, L->cols) / LANES, rows = L->rows - i * LANES;
    int n = smaller(GROUP, run->T - t);
    // what is stored: w + 1, or the upper halves of w + 128; of the lower ones 7.5 is the mean
    float unit = L->w_bits == 2 ? 1 : 16, excess = L->w_bits == 2 ? 1 : 120.5f;
    const int8_t *x[GROUP];
    Sums sums[GROUP];
    for (int j = 0; j < GROUP; j++) x[j] = slot(run, t + smaller(j, n - 1))->data;  // at least n
    kernel(L->weights + (int64_t)i * blocks * 32 * L->w_bits, blocks, x, n, L->w_bits, sums);
    for (int j = 0; j < n; j++) {
        const Slot *s = slot(run, t + j);
        const float *scales = L->scales + i * LANES;
        float *out = run->out + (int64_t)(t + j) * run->out_stride + i * LANES, y[LANES];
        for (int r = 0; r < LANES; r++)
            y[r] = (unit * sums[j][r] - excess * s->sum) * s->scale * scales[r];
        if (run->add) for (int r = 0; r < LANES; r++) out[r] += y[r];
        else if (rows >= LANES) memcpy(out, y, sizeof y);
        else memcpy(out, y, rows * sizeof *y);
    }
}

// Make a product with the head exact, by all 8 bits, where it is at least run->least of its token.
INLINE void refine(Run *run, int piece) {
    const Linear *L = run->L;
    int64_t n = L->rows, first = n * piece / run->pieces, stop = n * (piece + 1) / run->pieces;
    for (int t = 0; t < run->T; t++) {
        const Slot *s = slot(run, t);
        float *out = run->out + (int64_t)t * run->out_stride;
        for (int64_t r = first; r < stop; r++) {
            if (out[r] < run->least[t]) continue;
            const int8_t *w = L->codes + r * L->cols;
            int32_t total = 0;
            for (int i = 0; i < L->cols; i++) total += w[i] * s->data[i];
            out[r] = (float)total * s->scale * L->scales[r];
        }
    }
}

INLINE void multiply(Run *run, int piece, Kernel *kernel) {
    int64_t n = up_to(LANES, run->L->rows) / LANES;  // of 16 rows each
    for (int i = (int)(n * piece / run->pieces); i < n * (piece + 1) / run->pieces; i++)
        for (int t = 0; t < run->T; t += GROUP) multiply_rows(run, i, t, kernel);
}

// RoPE in place: (x_i, x_(i + D/2)) turned by the angle of frequency i at this position.
static void rotate(const Decoder *d, float *x, int D, int position) {
    const float *cos = d->cos + position * (D / 2), *sin = d->sin + position * (D / 2);
    for (int i = 0; i < D / 2; i++) {
        float a = x[i], b = x[i + D / 2];
        x[i] = a * cos[i] - b * sin[i];
        x[i + D / 2] = a * sin[i] + b * cos[i];
    }
}

// m queries (m, D) over n positions: y (m, D) = softmax(q k / sqrt(D)) v, by way of p (m, n 16s).
INLINE void attend(const float *q, const float *k, const float *v, int n, int D, const int m,
                   float *p, float *y) {
    int width = up_to(LANES, D) / LANES, N = up_to(LANES, n);
    const Lanes *keys = (const Lanes *)k, *values = (const Lanes *)v;  // (n / 16, D), (n, width)
    float scale = 1 / sqrtf(D), total[QUERIES];
    for (int i = 0; i < n; i += LANES, keys += D) {  // (what is behind n is never used)
        Lanes even[QUERIES] = {0}, odd[QUERIES] = {0};
        for (int j = 0; j < D; j += 2)
            for (int a = 0; a < m; a++)
                even[a] += q[a * D + j] * keys[j], odd[a] += q[a * D + j + 1] * keys[j + 1];
        for (int a = 0; a < m; a++) *(Lanes *)(p + a * N + i) = (even[a] + odd[a]) * scale;
    }
    for (int a = 0; a < m; a++) {
        float largest = max(p + a * N, n);
        for (int i = a * N; i < a * N + n; i++) p[i] = exponential(p[i] - largest);
        total[a] = sum(p + a * N, n);
    }
    for (int j = 0; j < width; j++) {
        Lanes even[QUERIES] = {0}, odd[QUERIES] = {0};
        for (int i = 0; i < n / 2 * 2; i += 2)
            for (int a = 0; a < m; a++)
                even[a] += p[a * N + i] * values[i * width + j],
                odd[a] += p[a * N + i + 1] * values[(i + 1) * width + j];
        for (int a = 0; a < m; a++) {
            if (n % 2) even[a] += p[a * N + n - 1] * values[(n - 1) * width + j];
            even[a] = (even[a] + odd[a]) / total[a];
            memcpy(y + a * D + j * LANES, &even[a], smaller(LANES, D - j * LANES) * sizeof *y);
        }
    }
}

// Key-value head g: new keys and values go to the cache; then its queries read from there, to y.
INLINE void attention(Run *run, int g, float *p) {
    const Decoder *d = run->d;
    int D = d->n_embd / d->n_head, queries = d->n_head / d->n_kv_head;
    int64_t cached = (int64_t)run->layer * d->n_kv_head + g;
    float *k = d->k + cached * up_to(LANES, d->block_size) * D;
    float *v = d->v + cached * d->block_size * up_to(LANES, D);
    for (int t = 0; t < run->T; t++) {
        int position = run->start + t;
        float *new_k = run->qkv + t * run->Q + d->n_embd + g * D, *new_v = new_k + d->n_kv_head * D;
        rotate(d, new_k, D, position);
        for (int i = 0; i < D; i++)
            k[(position / LANES * D + i) * LANES + position % LANES] = new_k[i];
        memcpy(v + position * up_to(LANES, D), new_v, D * sizeof *v);
    }
    for (int t = 0; t < (run->has_left ? 0 : run->T); t++)
        for (int i = g * queries, m, n = run->start + t + 1; i < (g + 1) * queries; i += m) {
            float *q = run->qkv + t * run->Q + i * D, *y = run->y + t * run->C + i * D;
            m = smaller(QUERIES, (g + 1) * queries - i);
            for (int a = 0; a < m; a++) rotate(d, q + a * D, D, n - 1);
            m == 1 ? attend(q, k, v, n, D, 1, p, y) : attend(q, k, v, n, D, QUERIES, p, y);
        }
}

// A6: sigmoid(w2 relu(w1 norm(h))).
INLINE float gate(Run *run, const float *h, float *x) {
    const Block *b = &run->d->blocks[run->layer];
    int C = run->d->n_embd;
    float score = 0;
    memcpy(x, h, C * sizeof *x);
    normalize(x, NULL, C, LAYERNORM, 1e-5f);
    for (int i = 0; i < run->d->gate_dim; i++) {
        float z = dot(b->gate1 + i * C, x, C);
        score += b->gate2[i] * (z > 0 ? z : 0);
    }
    return 1 / (1 + exponential(-score));
}

// e^((x - largest) / temperature) of n <= SOME logits x; returns their sum.
INLINE float powers(const float *restrict x, int n, float largest, float temperature,
                    float *restrict e) {
    for (int i = 0; i < n; i++) e[i] = exponential((x[i] - largest) / temperature);
    return sum(e, n);
}

// 1 / the softmax probability of the likeliest of n logits: sum e^((x - max) / temperature).
INLINE float spread(const float *x, int n, float temperature) {
    float largest = max(x, n), total = 0, e[SOME];
    for (int i = 0; i < n; i += SOME)
        total += powers(x + i, smaller(SOME, n - i), largest, temperature, e);
    return total;
}

// The likeliest of n tokens or, at a temperature, where their summed probabilities exceed `random`.
INLINE int choose(const float *x, int n, float temperature, float random) {
    float largest = max(x, n), e[SOME];
    int i = 0;
    if (temperature == 0) {
        while (i < n - 1 && x[i] != largest) i++;
        return i;
    }
    float left = random * spread(x, n, temperature);
    for (; i < n; i += SOME) {
        int m = smaller(SOME, n - i);
        float here = powers(x + i, m, largest, temperature, e);
        if (left < here)
            for (int j = 0; j < m; j++)
                if ((left -= e[j]) < 0) return i + j;
        left -= here;
    }
    return n - 1;
}

// -----------------------------------------------------------------------------------------------
// all this for each instruction set: "flatten" inlines, and so compiles anew, what is called

#define COMPILE(SET, set) \
    SET static void prepare_##set(Run *run, int t, float *scratch) { prepare(run, t, scratch); } \
    SET static void multiply_##set(Run *run, int i, float *x) { \
        (void)x, multiply(run, i, kernel_##set); } \
    SET static void refine_##set(Run *run, int i, float *x) { (void)x, refine(run, i); } \
    SET static void attention_##set(Run *run, int g, float *x) { attention(run, g, x); } \
    SET static float max_##set(const float *x, int n) { return max(x, n); } \
    SET static float gate_##set(Run *run, const float *h) { return gate(run, h, run->scratch); } \
    SET static float confidence_##set(const float *x, int n) { return 1 / spread(x, n, 1); } \
    SET static int choose_##set(const float *x, int n, float temperature, float random) { \
        return choose(x, n, temperature, random); }
#define FLATTEN __attribute__((flatten))
COMPILE(FLATTEN, portable)
#ifdef __x86_64__
COMPILE(FLATTEN AVX2, avx2)
COMPILE(FLATTEN AVX512, avx512)
#endif

static const struct {
    Task *prepare, *multiply, *refine, *attention;
    float (*max)(const float *x, int n);
    float (*gate)(Run *run, const float *h);
    float (*confidence)(const float *x, int n);
    int (*choose)(const float *x, int n, float temperature, float random);
} SETS[] = {
#define MEMBERS(set) {prepare_##set, multiply_##set, refine_##set, attention_##set, max_##set, \
                      gate_##set, confidence_##set, choose_##set}
    MEMBERS(portable),
#ifdef __x86_64__
    MEMBERS(avx2), MEMBERS(avx512),
#endif
};

int bitskip_isa(void) {  // the best of SETS here
#ifdef __x86_64__
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")
        && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni")) return 2;
    if (__builtin_cpu_supports("avx2")) return 1;
#endif
    return 0;
}

// -----------------------------------------------------------------------------------------------
// the step

// out = or += L(in), of all tokens at hand; strides are the lengths of their rows.
static void linear(Run *run, const Linear *L, const float *in, int in_stride, float *out,
                   int out_stride, int add) {
    run->L = L, run->in = in, run->in_stride = in_stride;
    run->out = out, run->out_stride = out_stride, run->add = add;
    share_out(run, SETS[run->d->isa].prepare, run->T);
    // pieces of some 10 microseconds: two million products each
    int pieces = smaller(4096, (int)((int64_t)L->rows * L->cols * run->T >> 21));
    pieces = smaller(larger(2 * run->d->threads, pieces), up_to(LANES, L->rows) / LANES);
    share_out(run, SETS[run->d->isa].multiply, pieces);
}

// One block. A token that has left gives it keys and values, and nothing else (state propagation).
static void run_block(Run *run, float *h) {
    const Block *b = &run->d->blocks[run->layer];
    linear(run, &b->qkv, h, run->C, run->qkv, run->Q, 0);
    share_out(run, SETS[run->d->isa].attention, run->d->n_kv_head);
    if (run->has_left) return;
    linear(run, &b->o, run->y, run->C, h, run->C, 1);
    linear(run, &b->up, h, run->C, run->ffn, run->F, 0);
    linear(run, &b->down, run->ffn, run->F, h, run->C, 1);
}

// The logits of T states h after block `layer`.
static void read_out(Run *run, int T, const float *h, int layer, float *logits) {
    Linear head = run->d->head;
    if (layer < run->d->n_layer - 1 && !run->d->normed_exits) head.norm_weight = NULL;
    run->T = T;
    linear(run, &head, h, run->C, logits, head.rows, 0);
    for (int t = 0; t < T; t++)
        run->least[t] = SETS[run->d->isa].max(logits + (int64_t)t * head.rows, head.rows)
                        - run->d->margin;
    share_out(run, SETS[run->d->isa].refine, smaller(2 * run->d->threads, 1 + head.rows / 4096));
}

// Does the token with this state leave after this block? (CONFIDENCE makes its logits on the way.)
static int leaves(Run *run, const Step *s, const float *h) {
    if (s->exit_mode == FULL || run->layer == s->last) return 0;
    if (s->exit_mode == GATE) return SETS[run->d->isa].gate(run, h) > s->threshold;
    read_out(run, 1, h, run->layer, s->logits);
    return SETS[run->d->isa].confidence(s->logits, run->d->vocab_size) > s->threshold;
}

static void embed(const Decoder *d, int64_t token, float *h) {
    const int8_t *codes = d->embedding + token * d->n_embd;
    for (int i = 0; i < d->n_embd; i++) h[i] = codes[i] * d->embedding_scales[token];
}

void bitskip_step(const Decoder *d, Step *s) {
    Run run;
    lay_out(d, &run);
    pthread_mutex_lock(&team.leading);
    wake_helpers(d->threads);
    s->exit_layer = s->last;
    for (int t = 0; t < s->T; t += CHUNK) {
        float *h = s->h + (int64_t)t * run.C;
        run.T = smaller(CHUNK, s->T - t), run.start = s->start + t;
        for (int i = 0; i < run.T && s->tokens; i++) embed(d, s->tokens[t + i], h + i * run.C);
        for (run.layer = s->first; run.layer <= s->last; run.layer++) {
            run_block(&run, h);
            if (!run.has_left && leaves(&run, s, h)) run.has_left = 1, s->exit_layer = run.layer;
        }
    }
    int has_logits = run.has_left && s->exit_mode == CONFIDENCE;
    const float *h = s->h + (int64_t)(s->T - s->n_logits) * run.C;
    for (int i = 0; i < s->n_logits && !has_logits; i += CHUNK)
        read_out(&run, smaller(CHUNK, s->n_logits - i), h + (int64_t)i * run.C, s->exit_layer,
                 s->logits + (int64_t)i * d->vocab_size);
    pthread_mutex_unlock(&team.leading);
}

// Draft tokens by the first blocks, as long as these are sure; then the other blocks check them.
void bitskip_draft(const Decoder *d, Draft *p) {
    int T = p->T, C = up_to(LANES, d->n_embd);
    Step s = {.tokens = p->tokens, .h = p->h, .logits = p->q, .T = T, .start = p->start,
              .last = p->layer, .n_logits = p->most > 0};
    bitskip_step(d, &s);
    for (p->n = 0; p->n < p->most; p->n++, T++, bitskip_step(d, &s)) {
        if (SETS[d->isa].confidence(s.logits, d->vocab_size) < p->confidence) break;
        p->tokens[T] = SETS[d->isa].choose(s.logits, d->vocab_size, p->temperature,
                                           p->random[p->n]);
        s = (Step){.tokens = p->tokens + T, .h = p->h + (int64_t)T * C, .T = 1,
                   .logits = s.logits + d->vocab_size, .start = p->start + T, .last = p->layer,
                   .n_logits = p->n + 1 < p->most};
    }
    s = (Step){.h = p->h, .logits = p->p, .T = T, .start = p->start, .first = p->layer + 1,
               .last = d->n_layer - 1, .n_logits = p->n + 1};
    bitskip_step(d, &s);
}

int64_t bitskip_workspace(const Decoder *d) {
    Run run;
    return lay_out(d, &run);
}
