// One rank of an MPI program, measured by the bench of lightrft-collectives beside our own ranks.
//
// The bench compiles this with mpicc, starts it with mpirun and gives the path of a Unix socket. A rank says who it is,
// then answers one line per order, `OP DTYPE COUNT WARMUP ITERATIONS`, by the nanoseconds of each iteration.
#define _GNU_SOURCE
#include <mpi.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

static int rank, ranks, count;
static char op[64];
static float *in, *out;
static MPI_Comm made;

static long long now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

// 0 if there is such an operation.
static int call(void) {
    int part = count / ranks;
    MPI_Comm all = MPI_COMM_WORLD;
    if (!strcmp(op, "all_reduce")) return MPI_Allreduce(MPI_IN_PLACE, out, count, MPI_FLOAT, MPI_SUM, all);
    if (!strcmp(op, "all_gather")) return MPI_Allgather(in, part, MPI_FLOAT, out, part, MPI_FLOAT, all);
    if (!strcmp(op, "reduce_scatter")) return MPI_Reduce_scatter_block(in, out, part, MPI_FLOAT, MPI_SUM, all);
    if (!strcmp(op, "broadcast")) return MPI_Bcast(out, count, MPI_FLOAT, 0, all);
    if (!strcmp(op, "all_to_all")) return MPI_Alltoall(in, part, MPI_FLOAT, out, part, MPI_FLOAT, all);
    if (!strcmp(op, "barrier")) return MPI_Barrier(all);
    if (!strcmp(op, "subgroup")) return MPI_Comm_split(all, 0, rank, &made);
    return -1;
}

// What is not timed after a call.
static void after(void) {
    if (!strcmp(op, "subgroup")) MPI_Comm_free(&made);
}

static float *written(int elements) {
    size_t bytes = sizeof(float) * (elements < 1 ? 1 : elements);
    // On a cache line, as torch's tensors and the buffers of our own ranks.
    bytes = (bytes + 63) / 64 * 64;
    float *memory = aligned_alloc(64, bytes);
    if (!memory) {
        fprintf(stderr, "no memory for %zu bytes\n", bytes);
        exit(1);
    }
    memset(memory, 0, bytes);
    return memory;
}

// Pins this thread to the core of its rank; ranks take turns where there are more of them than cores.
static void pin(void) {
    cpu_set_t allowed, mine;
    sched_getaffinity(0, sizeof allowed, &allowed);
    CPU_ZERO(&mine);
    for (int core = 0, seen = 0; core < CPU_SETSIZE; core++)
        if (CPU_ISSET(core, &allowed) && seen++ == rank % CPU_COUNT(&allowed)) CPU_SET(core, &mine);
    sched_setaffinity(0, sizeof mine, &mine);
}

int main(int argc, char **argv) {
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &ranks);
    const char *wish = getenv("LIGHTRFT_BENCH_PIN"), *path = getenv("LIGHTRFT_BENCH_SOCKET");
    if (wish && !strcmp(wish, "cores")) pin();
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    strncpy(address.sun_path, path ? path : "", sizeof address.sun_path - 1);
    int end = socket(AF_UNIX, SOCK_STREAM, 0);
    if (connect(end, (struct sockaddr *)&address, sizeof address)) {
        perror("LIGHTRFT_BENCH_SOCKET");
        return 1;
    }
    FILE *orders = fdopen(end, "r"), *answers = fdopen(dup(end), "w");
    char version[MPI_MAX_LIBRARY_VERSION_STRING];
    int length;
    MPI_Get_library_version(version, &length);
    version[strcspn(version, ",\n")] = 0;
    fprintf(answers, "hello %d %d %s\n", rank, (int)getpid(), version);
    fflush(answers);

    char line[256], wanted[64], dtype[16], last[128] = "";
    int elements, warmup, iterations;
    while (fgets(line, sizeof line, orders)) {
        if (sscanf(line, "%63s %15s %d %d %d", wanted, dtype, &elements, &warmup, &iterations) != 5) return 1;
        char buffers[128];
        snprintf(buffers, sizeof buffers, "%s %s %d", wanted, dtype, elements);
        int no_data = !strcmp(wanted, "barrier") || !strcmp(wanted, "subgroup");
        if (strcmp(buffers, last)) {
            free(in);
            free(out);
            // An object or a map counts something else than elements, and MPI knows neither.
            in = written(no_data ? 0 : elements);
            out = written(no_data ? 0 : elements);
            strcpy(last, buffers);
            strcpy(op, wanted);
            count = elements;
        }
        // There is no bf16 in MPI.
        int known = !strcmp(dtype, "f32") && strncmp(op, "status", 6) && strcmp(op, "all_gather_object") &&
                    strcmp(op, "failure");
        if (!known) {
            fprintf(answers, "unsupported %s of %s\n", op, dtype);
            fflush(answers);
            continue;
        }
        long long *times = malloc(sizeof *times * iterations);
        MPI_Barrier(MPI_COMM_WORLD);
        for (int i = -warmup; i < iterations; i++) {
            if (i == 0) MPI_Barrier(MPI_COMM_WORLD);
            long long begin = now();
            int status = call();
            long long time = now() - begin;
            if (status != MPI_SUCCESS) {
                fprintf(stderr, "%s: %d\n", op, status);
                return 1;
            }
            if (i >= 0) times[i] = time;
            after();
        }
        fprintf(answers, "ok");
        for (int i = 0; i < iterations; i++) fprintf(answers, " %lld", times[i]);
        fprintf(answers, "\n");
        fflush(answers);
        free(times);
    }
    MPI_Finalize();
    return 0;
}
