// The router of the delay laboratory: carries IPv4 packets between TUN devices, each after its link's delay.
//
// Links, switches and counters lie in memory shared with the laboratory (state.py has the same layout), so a
// change costs neither side a message: what is written there holds from the next packet on. Standard input is
// the laboratory's life line: when it ends, every process that carries the laboratory's mark is killed, and then
// this one ends, which makes the devices vanish.
//
// usage: router SHM_FD MARK

#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#define MAGIC 0x31424c41u  // "ALB1"
#define MAX_PACKET 65536
#define HEADER_BYTES 4096
#define LATENESS_BUCKETS 32
// Packets read from one device before due ones are delivered: about 50 us of work.
#define READ_BURST 16

struct header {
    uint32_t magic, nodes;
    uint32_t network, ready;         // 10.x.0.0 in host order; set to 1 once packets flow
    uint64_t queue_bytes;            // what may wait for a link with a rate
    uint64_t held_bytes_max;         // what may be under way in all
    uint64_t seed;
    // Written here, read there.
    uint64_t forwarded, lost, cut, overflow, unroutable, failed, held_bytes;
    uint64_t late_max_ns;
    uint64_t lateness[LATENESS_BUCKETS];  // [k]: delivered less than 2**k us after its time, not less than half that
};

// One direction of one pair. 32 bytes.
struct link {
    uint64_t delay_ns;
    uint64_t jitter_ns;              // up to this much more, uniformly
    uint64_t bytes_per_s;            // 0: no limit
    uint32_t loss;                   // of 2**32
    uint32_t cut;
};

struct progress {                    // of one link; private
    uint64_t free_ns;                // when the last byte before will have been sent
    uint64_t last_due_ns;            // packets of a link stay in order
};

struct packet {
    uint64_t due_ns, number;
    uint32_t link;
    uint32_t size;
    uint8_t data[];
};

static struct header *head;
static struct link *links;
static struct progress *moving;
static int32_t *tuns;
static uint32_t nodes;

static struct packet **heap;
static size_t heap_used, heap_room;
static uint64_t numbers, rng;

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void die(const char *what) {
    perror(what);
    exit(1);
}

static uint64_t draw(void) {         // xorshift64*
    rng ^= rng >> 12;
    rng ^= rng << 25;
    rng ^= rng >> 27;
    return rng * 2685821657736338717u;
}

static int before(const struct packet *a, const struct packet *b) {
    return a->due_ns != b->due_ns ? a->due_ns < b->due_ns : a->number < b->number;
}

static void push(struct packet *p) {
    if (heap_used == heap_room) {
        heap_room = heap_room ? 2 * heap_room : 1024;
        heap = realloc(heap, heap_room * sizeof *heap);
        if (!heap) die("realloc");
    }
    size_t at = heap_used++;
    while (at) {
        size_t up = (at - 1) / 2;
        if (!before(p, heap[up])) break;
        heap[at] = heap[up];
        at = up;
    }
    heap[at] = p;
}

static struct packet *pop(void) {
    struct packet *top = heap[0], *last = heap[--heap_used];
    size_t at = 0;
    for (;;) {
        size_t down = 2 * at + 1;
        if (down >= heap_used) break;
        if (down + 1 < heap_used && before(heap[down + 1], heap[down])) down++;
        if (!before(heap[down], last)) break;
        heap[at] = heap[down];
        at = down;
    }
    heap[at] = last;
    return top;
}

static void note_lateness(uint64_t late_ns) {
    if (late_ns > head->late_max_ns) head->late_max_ns = late_ns;
    uint64_t us = late_ns / 1000;
    int bucket = 0;
    while (us && bucket < LATENESS_BUCKETS - 1) { us >>= 1; bucket++; }
    head->lateness[bucket]++;
}

static void deliver_due(void) {
    while (heap_used) {
        uint64_t now = now_ns();
        if (heap[0]->due_ns > now) return;
        struct packet *p = pop();
        if (links[p->link].cut) {
            head->cut++;
        } else if (write(tuns[p->link % nodes], p->data, p->size) != (ssize_t)p->size) {
            head->failed++;
        } else {
            head->forwarded++;
            note_lateness(now - p->due_ns);
        }
        head->held_bytes -= p->size;
        free(p);
    }
}

static void take(uint32_t from, const uint8_t *data, uint32_t size) {
    uint32_t address, to;
    if (size < 20 || data[0] >> 4 != 4) { head->unroutable++; return; }
    memcpy(&address, data + 16, 4);
    to = __builtin_bswap32(address) - head->network - 1;  // node i is network + i + 1
    if (to >= nodes || to == from) { head->unroutable++; return; }
    uint32_t index = from * nodes + to;
    struct link *l = &links[index];
    struct progress *m = &moving[index];
    if (l->cut) { head->cut++; return; }
    if (l->loss && (uint32_t)(draw() >> 32) < l->loss) { head->lost++; return; }
    uint64_t now = now_ns(), due = now;
    if (l->bytes_per_s) {
        uint64_t start = m->free_ns > now ? m->free_ns : now;
        if ((start - now) / 1000 * l->bytes_per_s / 1000000 + size > head->queue_bytes) { head->overflow++; return; }
        due = m->free_ns = start + (uint64_t)size * 1000000000u / l->bytes_per_s;
    }
    if (head->held_bytes + size > head->held_bytes_max) { head->overflow++; return; }
    due += l->delay_ns;
    if (l->jitter_ns) due += draw() % (l->jitter_ns + 1);
    if (due < m->last_due_ns) due = m->last_due_ns;
    m->last_due_ns = due;
    struct packet *p = malloc(sizeof *p + size);
    if (!p) die("malloc");
    p->due_ns = due;
    p->number = numbers++;
    p->link = index;
    p->size = size;
    memcpy(p->data, data, size);
    head->held_bytes += size;
    push(p);
}

static void kill_marked(const char *mark) {
    // Twice: a process may have forked behind our back.
    for (int round = 0; round < 2; round++) {
        DIR *dir = opendir("/proc");
        struct dirent *entry;
        if (!dir) return;
        while ((entry = readdir(dir))) {
            int pid = atoi(entry->d_name);
            if (pid <= 1 || pid == getpid()) continue;
            char path[64];
            snprintf(path, sizeof path, "/proc/%d/environ", pid);
            int fd = open(path, O_RDONLY);
            if (fd < 0) continue;
            static char text[1 << 20];
            size_t used = 0;
            ssize_t got;
            while (used < sizeof text && (got = read(fd, text + used, sizeof text - used)) > 0) used += (size_t)got;
            close(fd);
            size_t length = strlen(mark) + 1;  // with its NUL: marks may begin alike
            if (memmem(text, used, mark, length)) kill(pid, SIGKILL);
        }
        closedir(dir);
    }
}

static void serve(const char *mark) {
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    int timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    if (epoll < 0 || timer < 0) die("epoll");
    struct epoll_event event = {.events = EPOLLIN, .data.u32 = nodes};
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, timer, &event)) die("epoll_ctl");
    event.data.u32 = nodes + 1;
    event.events = EPOLLIN | EPOLLHUP;
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, 0, &event)) die("epoll_ctl");
    for (uint32_t i = 0; i < nodes; i++) {
        event.events = EPOLLIN;
        event.data.u32 = i;
        if (epoll_ctl(epoll, EPOLL_CTL_ADD, tuns[i], &event)) die("epoll_ctl");
    }
    static uint8_t buffer[MAX_PACKET];
    struct epoll_event events[64];
    uint64_t armed = 0;              // when the timer will ring; 0: it will not
    __atomic_store_n(&head->ready, 1, __ATOMIC_RELEASE);
    for (;;) {
        deliver_due();
        if (heap_used && (!armed || heap[0]->due_ns < armed)) {
            armed = heap[0]->due_ns;
            struct itimerspec at = {.it_value = {(time_t)(armed / 1000000000u), (long)(armed % 1000000000u)}};
            if (timerfd_settime(timer, TFD_TIMER_ABSTIME, &at, NULL)) die("timerfd_settime");
        }
        int count = epoll_wait(epoll, events, 64, -1);
        if (count < 0 && errno != EINTR) die("epoll_wait");
        for (int k = 0; k < count; k++) {
            uint32_t which = events[k].data.u32;
            if (which == nodes) {
                uint64_t ignored;
                if (read(timer, &ignored, sizeof ignored) > 0) armed = 0;
            } else if (which == nodes + 1) {
                char ignored;
                if (read(0, &ignored, 1) <= 0) { kill_marked(mark); exit(0); }
            } else {
                for (int burst = 0; burst < READ_BURST; burst++) {
                    ssize_t got = read(tuns[which], buffer, sizeof buffer);
                    if (got <= 0) break;
                    take(which, buffer, (uint32_t)got);
                }
                deliver_due();
            }
        }
    }
}

int main(int argc, char **argv) {
    if (argc != 3) { fprintf(stderr, "usage: router SHM_FD MARK\n"); return 2; }
    int fd = atoi(argv[1]);
    struct stat status;
    if (fstat(fd, &status)) die("fstat");
    uint8_t *memory = mmap(NULL, (size_t)status.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (memory == MAP_FAILED) die("mmap");
    head = (struct header *)memory;
    nodes = head->nodes;
    size_t pairs = (size_t)nodes * nodes;
    size_t wanted = HEADER_BYTES + pairs * sizeof *links + nodes * sizeof *tuns;
    if (head->magic != MAGIC || (size_t)status.st_size < wanted) { fprintf(stderr, "router: wrong layout\n"); return 2; }
    links = (struct link *)(memory + HEADER_BYTES);
    tuns = (int32_t *)(memory + HEADER_BYTES + pairs * sizeof *links);
    moving = calloc(pairs, sizeof *moving);
    if (!moving) die("calloc");
    rng = head->seed | 1;
    signal(SIGINT, SIG_IGN);         // Ctrl-C is the laboratory's; its end is ours
    struct sched_param priority = {.sched_priority = 1};
    // Packets must not wait for the processes that send them. Not allowed everywhere; then it is a little later.
    (void)!sched_setscheduler(0, SCHED_FIFO, &priority);
    serve(argv[2]);
}
