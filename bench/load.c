// load: the load client of the benchmarks.
//
// Opens N WebSocket subscribers over loopback with one epoll loop, publishes over one more connection (WebSocket
// or HTTP), and prints one line of JSON for each measured run: messages delivered, latency percentiles, and the
// CPU time and memory (PSS) of the server's whole process tree.
//
// It knows nothing of a server's protocol. What is sent comes from templates, and what is counted is a marker
// inside the payload, wherever it turns up in the received bytes: however a server frames or joins its messages,
// they are counted alike.
//
//   marker    @T, 16 hex digits of CLOCK_MONOTONIC in ns (when it was published), 2 hex digits of a number
//   template  %C is the channel's number, %P the payload, %L the payload's length; \r\n are these two bytes
//
// Build: cc -O2 -o load load.c      Use: README.md, and run.py.

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <getopt.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MARK "@T"
#define MARK_LEN 20
#define READ_SIZE (1 << 20)
#define EARLY_SIZE 8192
#define MAX_RUNS 8
#define MAX_TREE 512
#define BURST 64
#define PUBLISHER UINT32_MAX

// ---------------------------------------------------------------------------------------------- options

// One measured run over the connections that are open: paced (rate > 0) or with so many messages outstanding.
typedef struct {
  double rate;
  int messages, window, batch;
} Run;

static struct {
  int port, pid, subs, channels, size, binary, ramp, settle_ms, half, idle_runs, idle_ms, others, missed;
  double seconds;
  const char *path, *subscribe, *ready, *publish, *http, *wrap, *header, *hello, *resume, *others_subscribe, *others_publish;
  Run runs[MAX_RUNS];
  int nruns;
} opt = {.port = 8080, .subs = 1000, .channels = 1, .size = 64, .ramp = 32, .settle_ms = 400, .seconds = 30,
         .path = "/ws", .ready = "", .header = "", .idle_ms = 2000};

static void die(const char *what) {
  fprintf(stderr, "load: %s: %s\n", what, errno ? strerror(errno) : "unexpected");
  exit(2);
}

static uint64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000ull + t.tv_nsec;
}

// "rate=50,messages=200" or "window=16,messages=2000,batch=100"
static Run parse_run(char *text) {
  Run run = {.window = 1, .batch = 1};
  for (char *part = strtok(text, ","); part; part = strtok(NULL, ",")) {
    char *value = strchr(part, '=');
    if (!value) die("--run needs NAME=NUMBER,...");
    *value++ = 0;
    if (!strcmp(part, "rate")) run.rate = atof(value);
    else if (!strcmp(part, "messages")) run.messages = atoi(value);
    else if (!strcmp(part, "window")) run.window = atoi(value);
    else if (!strcmp(part, "batch")) run.batch = atoi(value);
    else die("--run knows rate, messages, window and batch");
  }
  return run;
}

// ------------------------------------------------------------------- what the server costs: /proc of its tree

// `pid` and all its descendants; how many.
static int tree(int pid, int *found) {
  int count = 0;
  found[count++] = pid;
  for (int i = 0; i < count; i++) {
    char name[400];
    snprintf(name, sizeof name, "/proc/%d/task", found[i]);
    DIR *tasks = opendir(name);
    if (!tasks) continue;
    for (struct dirent *task; (task = readdir(tasks));) {
      if (task->d_name[0] == '.') continue;
      snprintf(name, sizeof name, "/proc/%d/task/%s/children", found[i], task->d_name);
      FILE *children = fopen(name, "r");
      if (!children) continue;
      for (int child; count < MAX_TREE && fscanf(children, "%d", &child) == 1;) found[count++] = child;
      fclose(children);
    }
    closedir(tasks);
  }
  return count;
}

// Nanoseconds of CPU of one process: the scheduler's own count of each thread, and where the kernel keeps none,
// user and system time in ticks.
static double cpu_of_process(int pid) {
  char name[400];
  double sum = 0;
  int exact = 0;
  snprintf(name, sizeof name, "/proc/%d/task", pid);
  DIR *tasks = opendir(name);
  for (struct dirent *task; tasks && (task = readdir(tasks));) {
    if (task->d_name[0] == '.') continue;
    snprintf(name, sizeof name, "/proc/%d/task/%s/schedstat", pid, task->d_name);
    FILE *file = fopen(name, "r");
    unsigned long long ran;
    if (file && fscanf(file, "%llu", &ran) == 1) sum += ran, exact = 1;
    if (file) fclose(file);
  }
  if (tasks) closedir(tasks);
  if (exact) return sum;
  snprintf(name, sizeof name, "/proc/%d/stat", pid);
  FILE *file = fopen(name, "r");
  char text[1024] = "";
  if (file) text[fread(text, 1, sizeof text - 1, file)] = 0, fclose(file);
  char *rest = strrchr(text, ')');
  unsigned long user, kernel;
  if (rest && sscanf(rest + 2, "%*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %lu %lu", &user, &kernel) == 2)
    sum = (user + kernel) * 1e9 / sysconf(_SC_CLK_TCK);
  return sum;
}

static double server_cpu_ns(void) {
  int pids[MAX_TREE];
  double sum = 0;
  for (int i = opt.pid ? tree(opt.pid, pids) : 0; i--;) sum += cpu_of_process(pids[i]);
  return sum;
}

static double server_pss_kb(void) {
  int pids[MAX_TREE];
  double sum = 0;
  for (int i = opt.pid ? tree(opt.pid, pids) : 0; i--;) {
    char line[256];
    long kb;
    snprintf(line, sizeof line, "/proc/%d/smaps_rollup", pids[i]);
    FILE *file = fopen(line, "r");
    if (!file) continue;
    while (fgets(line, sizeof line, file))
      if (sscanf(line, "Pss: %ld", &kb) == 1) sum += kb;
    fclose(file);
  }
  return sum;
}

// --------------------------------------------------------------------------- latencies, in buckets of about 6 %

static uint64_t buckets[64 * 16];

static void record(uint64_t ns) {
  if (ns < 16) {
    buckets[ns]++;
  } else {
    int log = 63 - __builtin_clzll(ns);
    buckets[log * 16 + ((ns >> (log - 4)) & 15)]++;
  }
}

static double percentile_ms(double part) {
  uint64_t total = 0, sum = 0;
  for (int i = 0; i < 64 * 16; i++) total += buckets[i];
  for (int i = 0; i < 64 * 16; i++) {
    sum += buckets[i];
    if (total && sum > (uint64_t)(total * part)) return i < 64 ? i / 1e6 : (double)((16ull + i % 16) << (i / 16 - 4)) / 1e6;
  }
  return 0;
}

// ------------------------------------------------------------------------------------------------ connections

typedef enum { CLOSED, DIALING, UPGRADING, JOINING, OPEN } State;

typedef struct {
  int fd;
  uint8_t state, carried;
  char carry[MARK_LEN];  // the end of the last read, where a marker may have begun
  char *early;           // what came before it was open; NULL after that
  int early_len;
  uint64_t got, seen;    // markers in all; which numbers (0 to 63), a bit each
  char session[64];      // what a bcast.v1 server calls it; for --resume
} Conn;

static Conn *conns;
static int loop_fd, opened, closed_by_server;
static uint64_t delivered, last_delivery;
static char *buffer;

// Copy `template` with its placeholders filled in; the caller frees it.
static char *expand(const char *template, int channel, const char *payload) {
  size_t room = strlen(template) * 12 + 64;
  for (const char *p = template; (p = strstr(p, "%P")); p++) room += strlen(payload);
  char *text = malloc(room), *out = text;
  for (const char *p = template; *p;) {
    if (!strncmp(p, "%C", 2)) out += sprintf(out, "%d", channel), p += 2;
    else if (!strncmp(p, "%P", 2)) out = stpcpy(out, payload), p += 2;
    else if (!strncmp(p, "%L", 2)) out += sprintf(out, "%zu", strlen(payload)), p += 2;
    else if (!strncmp(p, "\\r\\n", 4)) out = stpcpy(out, "\r\n"), p += 4;
    else *out++ = *p++;
  }
  *out = 0;
  return text;
}

static void send_all(int fd, const char *data, size_t size) {
  while (size) {
    ssize_t sent = send(fd, data, size, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent < 0) {
      if (errno != EAGAIN) die("send");
      struct pollfd writable = {.fd = fd, .events = POLLOUT};
      if (poll(&writable, 1, 5000) == 0) die("the server does not read");
      continue;
    }
    data += sent;
    size -= sent;
  }
}

// A client's frame, with a mask of zeros, which is valid and leaves the payload as it is.
static void send_frame(int fd, const char *text) {
  size_t size = strlen(text), head = 0;
  unsigned char *out = malloc(size + 14);
  out[head++] = 0x80 | (opt.binary ? 2 : 1);
  if (size < 126) {
    out[head++] = 0x80 | size;
  } else if (size < 65536) {
    out[head++] = 0x80 | 126, out[head++] = size >> 8, out[head++] = size;
  } else {
    out[head++] = 0x80 | 127;
    for (int shift = 56; shift >= 0; shift -= 8) out[head++] = (uint64_t)size >> shift;
  }
  memset(out + head, 0, 4);
  memcpy(out + head + 4, text, size);
  send_all(fd, (char *)out, head + 4 + size);
  free(out);
}

static int dial(int number) {
  int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), one = 1;
  if (fd < 0) die("socket");
  // Some 28,000 ports for each local address are not enough for everything; 127.0.0.2 and on have as many.
  struct sockaddr_in from = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(0x7f000001 + number / 20000)};
  struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(opt.port), .sin_addr.s_addr = htonl(0x7f000001)};
  setsockopt(fd, IPPROTO_IP, 24 /* IP_BIND_ADDRESS_NO_PORT */, &one, sizeof one);
  if (bind(fd, (void *)&from, sizeof from)) die("bind");
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  if (connect(fd, (void *)&to, sizeof to) && errno != EINPROGRESS) die("connect");
  return fd;
}

static void send_upgrade(int fd, int channel, const char *session) {
  char request[2048], *path = expand(opt.path, channel, "");
  int size = snprintf(request, sizeof request,
                      "GET %s%s%s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                      "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n%s\r\n",
                      path, *session ? "?session=" : "", session, opt.port, opt.header);
  free(path);
  send_all(fd, request, size);
}

// The last `others` subscribers are on another channel, and the rest spread over `channels`.
static int is_other(int i) { return i >= opt.subs; }
static int channel_of(int i) { return is_other(i) ? 0 : i % opt.channels; }

static void start(int i, int again) {
  Conn *conn = &conns[i];
  conn->fd = dial(i);
  conn->state = DIALING;
  conn->early = malloc(EARLY_SIZE);
  conn->early_len = conn->carried = 0;
  if (!again) conn->session[0] = 0;
  struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLET, .data.u32 = i};
  epoll_ctl(loop_fd, EPOLL_CTL_ADD, conn->fd, &event);
}

static void drop(Conn *conn) {
  if (conn->state == OPEN) opened--;
  close(conn->fd);
  free(conn->early);
  conn->early = NULL;
  conn->state = CLOSED;
}

static void become_open(Conn *conn) {
  free(conn->early);
  conn->early = NULL;
  conn->state = OPEN;
  opened++;
}

// Where `text` stands in what came early, which may hold zeros; NULL where it does not.
static char *find_early(const Conn *conn, const char *text) {
  return memmem(conn->early, conn->early_len, text, strlen(text));
}

// Take a connection that is not open yet a step on, as far as what has come so far allows.
static void advance(int i) {
  Conn *conn = &conns[i];
  const char *subscribe = is_other(i) ? opt.others_subscribe : opt.subscribe;
  int resuming = conn->session[0] && opt.resume != NULL;
  if (conn->state == UPGRADING && find_early(conn, "\r\n\r\n")) {
    if (!find_early(conn, " 101 ")) fprintf(stderr, "load: no 101: %.200s\n", conn->early), exit(2);
    conn->state = JOINING;
    if (subscribe && !resuming) {
      char *text = expand(subscribe, channel_of(i), "");
      send_frame(conn->fd, text);
      free(text);
    }
  }
  const char *ready = resuming ? opt.resume : opt.ready;
  if (conn->state == JOINING && (!*ready || find_early(conn, ready))) {
    char *session = find_early(conn, "\"session\":\"");
    if (session && opt.resume) {
      size_t size = strcspn(session += 11, "\"");
      if (size < sizeof conn->session) memcpy(conn->session, session, size), conn->session[size] = 0;
    }
    become_open(conn);
  }
}

// Count the markers in what a connection has received; `data` has MARK_LEN bytes of room in front of it.
static void count_markers(int i, char *data, size_t size, uint64_t now) {
  Conn *conn = &conns[i];
  data -= conn->carried;
  size += conn->carried;
  memcpy(data, conn->carry, conn->carried);
  char *end = data + size, *mark;
  while ((mark = memmem(data, end - data, MARK, 2)) && end - mark >= MARK_LEN) {
    char digits[17];
    memcpy(digits, mark + 2, 16), digits[16] = 0;
    uint64_t sent = strtoull(digits, NULL, 16);
    memcpy(digits, mark + 18, 2), digits[2] = 0;
    conn->seen |= 1ull << (strtoul(digits, NULL, 16) & 63);
    conn->got++;
    if (!opt.resume || is_other(i)) {
      record(now > sent ? now - sent : 0);
      delivered++;
      last_delivery = now;
    }
    data = mark + MARK_LEN;
  }
  char *kept = mark ? mark : end > data && end[-1] == MARK[0] ? end - 1 : end;
  conn->carried = end - kept;
  memmove(conn->carry, kept, conn->carried);
}

// With acks, a server sends again what was not acked: say that all of it has come.
static void acknowledge(int i, const char *data, size_t size) {
  const char *last = NULL;
  for (const char *p = data; (p = memmem(p, data + size - p, "\"seq\":", 6)); p++) last = p;
  if (last && conns[i].session[0]) {
    char text[128];
    snprintf(text, sizeof text, "{\"type\":\"ack\",\"channel\":\"p.%d\",\"seq\":%ld}", channel_of(i), atol(last + 6));
    send_frame(conns[i].fd, text);
  }
}

static void receive(int i, uint64_t now) {
  Conn *conn = &conns[i];
  for (;;) {
    char *data = buffer + MARK_LEN;
    ssize_t size = recv(conn->fd, data, READ_SIZE, 0);
    if (size < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (size <= 0) {
      if (conn->state != OPEN && size < 0) die("a connection was refused");
      closed_by_server++;
      drop(conn);
      return;
    }
    if (conn->early) {
      int room = EARLY_SIZE - 1 - conn->early_len, copied = size < room ? size : room;
      memcpy(conn->early + conn->early_len, data, copied);
      conn->early[conn->early_len += copied] = 0;
      advance(i);
    }
    count_markers(i, data, size, now);
    if (opt.resume && !is_other(i) && memmem(data, size, MARK, 2)) acknowledge(i, data, size);
    if (size < READ_SIZE) return;
  }
}

// --------------------------------------------------------------------------------------------------- publishing

static int publisher = -1;
static uint64_t published, answered;  // messages; HTTP answers

static void open_publisher(void) {
  publisher = dial(0);
  struct pollfd ready = {.fd = publisher, .events = POLLOUT};
  poll(&ready, 1, 5000);
  if (!opt.http) {
    send_upgrade(publisher, 0, "");
    char answer[4096];
    size_t size = 0;
    ready.events = POLLIN;
    do {
      if (poll(&ready, 1, 5000) <= 0) die("no answer to the publisher's upgrade");
      ssize_t got = recv(publisher, answer + size, sizeof answer - 1 - size, 0);
      if (got <= 0) die("the publisher's upgrade");
      answer[size += got] = 0;
    } while (!strstr(answer, "\r\n\r\n"));
    if (!strstr(answer, " 101 ")) die("the publisher's upgrade was refused");
    if (opt.hello) {
      char *text = expand(opt.hello, 0, "");
      send_frame(publisher, text);
      free(text);
    }
  }
  struct epoll_event event = {.events = EPOLLIN, .data.u32 = PUBLISHER};
  epoll_ctl(loop_fd, EPOLL_CTL_ADD, publisher, &event);
}

// The payload of message `number`: the marker, and filling up to --size.
static const char *make_payload(int number) {
  static char *payload;
  int size = opt.size < MARK_LEN ? MARK_LEN : opt.size;
  if (!payload) payload = memset(malloc(size + 1), 'x', size), payload[size] = 0;
  char mark[MARK_LEN + 1];
  snprintf(mark, sizeof mark, MARK "%016lx%02x", (unsigned long)now_ns(), number & 63);
  memcpy(payload, mark, MARK_LEN);
  return payload;
}

// Publish message `number`, over HTTP with the following ones as a batch; each to the next channel from `channel` on.
static void publish(const char *template, int number, int channel, int batch) {
  if (!opt.http) {
    char *text = expand(template, channel % opt.channels, make_payload(number));
    send_frame(publisher, text);
    free(text);
    published++;
    return;
  }
  char *body = malloc((strlen(template) * 12 + opt.size + 128) * batch + 256), *out = body;
  const char *wrap = opt.wrap ? opt.wrap : "%I", *inside = strstr(wrap, "%I");
  out = mempcpy(out, wrap, inside - wrap);
  for (int i = 0; i < batch; i++) {
    char *item = expand(template, (channel + i) % opt.channels, make_payload(number + i));
    out = stpcpy(stpcpy(out, i ? "," : ""), item);
    free(item);
  }
  out = stpcpy(out, inside + 2);
  char head[1024], *path = expand(opt.http, channel % opt.channels, "");
  int size = snprintf(head, sizeof head,
                      "POST %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Type: application/json\r\n%s"
                      "Content-Length: %zu\r\n\r\n", path, opt.port, opt.header, (size_t)(out - body));
  send_all(publisher, head, size);
  send_all(publisher, body, out - body);
  free(path), free(body);
  published += batch;
}

static void receive_answers(void) {
  char *data = buffer + MARK_LEN;
  ssize_t size;
  while ((size = recv(publisher, data, READ_SIZE, MSG_DONTWAIT)) > 0)
    for (char *p = data; opt.http && (p = memmem(p, data + size - p, "HTTP/1.1 2", 10)); p++) answered++;
  if (size == 0) errno = 0, die("the publisher's connection was closed");
}

// One turn of the loop; how many events.
static int turn(int timeout_ms) {
  struct epoll_event events[1024];
  int count = epoll_wait(loop_fd, events, 1024, timeout_ms);
  uint64_t now = now_ns();
  for (int k = 0; k < count; k++) {
    uint32_t i = events[k].data.u32;
    if (i == PUBLISHER) {
      receive_answers();
      continue;
    }
    Conn *conn = &conns[i];
    if (conn->state == DIALING && events[k].events & (EPOLLOUT | EPOLLERR | EPOLLHUP)) {
      int error = 0;
      socklen_t size = sizeof error;
      getsockopt(conn->fd, SOL_SOCKET, SO_ERROR, &error, &size);
      if (error) errno = error, die("connect");
      conn->state = UPGRADING;
      send_upgrade(conn->fd, channel_of(i), opt.resume ? conn->session : "");
      // From now on only reading is of interest.
      struct epoll_event event = {.events = EPOLLIN | EPOLLET, .data.u32 = i};
      epoll_ctl(loop_fd, EPOLL_CTL_MOD, conn->fd, &event);
    }
    if (conn->state > DIALING && events[k].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) receive(i, now);
  }
  return count;
}

static void rest(int ms) {
  for (uint64_t end = now_ns() + ms * 1000000ull, now; (now = now_ns()) < end;) turn((end - now) / 1000000 + 1);
}

// ------------------------------------------------------------------------------------------- what is measured

// Open connections `from` to `to`, `ramp` at a time.
static void open_all(int from, int to) {
  int begun = from, before = opened;
  uint64_t deadline = now_ns() + 120000000000ull;
  while (opened - before < to - from) {
    while (begun < to && begun - from - (opened - before) < opt.ramp) start(begun++, 0);
    turn(100);
    if (now_ns() > deadline) errno = 0, die("not all connections came to stand in two minutes");
  }
}

// Publish a run's messages and wait for the last delivery.
static void measure(Run run) {
  memset(buckets, 0, sizeof buckets);
  delivered = published = answered = 0;
  closed_by_server = 0;
  int per_message = opt.subs / opt.channels;
  uint64_t expected = 0, begun = last_delivery = now_ns();
  double cpu = server_cpu_ns();
  for (;;) {
    double elapsed = (now_ns() - begun) / 1e9;
    int all = published >= (uint64_t)run.messages;
    // The last deliveries may be lost: give them three seconds.
    if (elapsed > opt.seconds || (all && (delivered >= expected || now_ns() - last_delivery > 3000000000ull))) break;
    while (published < (uint64_t)run.messages) {
      if (run.rate > 0 ? elapsed * run.rate < published : delivered + (uint64_t)run.window * per_message <= expected) break;
      if (opt.http && published >= answered * run.batch + run.window) break;
      publish(opt.publish, published, published, run.batch);
      expected = published * per_message;
    }
    turn(run.rate > 0 ? 1 : 20);
  }
  cpu = server_cpu_ns() - cpu;
  double seconds = (last_delivery - begun) / 1e9;
  printf("{\"kind\":\"%s\",\"messages\":%lu,\"expected\":%lu,\"delivered\":%lu,\"closed\":%d,\"seconds\":%.3f,"
         "\"per_second\":%.0f,\"p50_ms\":%.3f,\"p99_ms\":%.3f,\"max_ms\":%.3f,\"cpu_s\":%.4f,\"us_per_delivery\":%.4f,"
         "\"us_per_message\":%.3f}\n",
         run.rate > 0 ? "paced" : "window", published, expected, delivered, closed_by_server, seconds,
         seconds > 0 ? delivered / seconds : 0, percentile_ms(.5), percentile_ms(.99), percentile_ms(1 - 1e-9), cpu / 1e9,
         delivered ? cpu / 1e3 / delivered : 0, published ? cpu / 1e3 / published : 0);
  fflush(stdout);
}

// Nothing happens: what does the server do all the same?
static void measure_idle(void) {
  for (int i = 0; i < opt.idle_runs; i++) {
    double cpu = server_cpu_ns();
    uint64_t begun = now_ns();
    rest(opt.idle_ms);
    printf("{\"kind\":\"idle\",\"percent\":%.4f}\n", 100 * (server_cpu_ns() - cpu) / (now_ns() - begun));
    fflush(stdout);
  }
}

// All subscribers lose their connection at once, miss `missed` messages and come back with their sessions, while
// the others are sent paced messages all the time.
static void measure_resume(void) {
  double rate = opt.nruns ? opt.runs[0].rate : 20;
  uint64_t paced = 0, missed = 0, begun = now_ns(), cut = 0, returned = 0, back = 0, complete = 0;
  // Dropped and begun again so far: some in each turn, or what is measured would be this client's own pause.
  int dropped = 0, started = 0;
  memset(buckets, 0, sizeof buckets);
  delivered = 0;
  double cpu = 0;
  for (;;) {
    uint64_t now = now_ns();
    if (now - begun > 1000000000ull)
      for (int n = 0; n < BURST && dropped < opt.subs; n++, dropped++) {
        drop(&conns[dropped]);
        conns[dropped].seen = conns[dropped].got = 0;
        if (dropped == opt.subs - 1) cut = now;
      }
    // Half a second without connections, in which the messages are published.
    if (cut && missed < (uint64_t)opt.missed && now - cut > (missed + 1) * 500000000ull / (opt.missed + 1)) {
      for (int channel = 0; channel < opt.channels; channel++) publish(opt.publish, missed, channel, 1);
      missed++;
    }
    if (cut && !returned && now - cut > 500000000ull) {
      returned = now;
      cpu = server_cpu_ns();
    }
    for (int n = 0; returned && n < BURST && started < opt.subs; n++) start(started++, 1);
    while ((now - begun) / 1e9 * rate >= paced) publish(opt.others_publish, paced++, 0, 1);
    turn(1);
    if (returned && !back && opened == opt.subs + opt.others) back = now_ns(), cpu = server_cpu_ns() - cpu;
    if (back && !complete) {
      uint64_t wanted = opt.missed == 64 ? ~0ull : (1ull << opt.missed) - 1;
      int i = 0;
      while (i < opt.subs && (conns[i].seen & wanted) == wanted) i++;
      if (i == opt.subs) complete = now_ns();
    }
    // A second longer, for what the burst leaves behind.
    if ((complete && now - complete > 1000000000ull) || (returned && (now - returned) / 1e9 > opt.seconds)) break;
  }
  uint64_t lost = 0, again = 0;
  for (int i = 0; i < opt.subs; i++) {
    int got = __builtin_popcountll(conns[i].seen);
    lost += opt.missed > got ? opt.missed - got : 0;
    again += conns[i].got - got;
  }
  printf("{\"kind\":\"resume\",\"back\":%d,\"back_s\":%.3f,\"complete_s\":%.3f,\"lost\":%lu,\"again\":%lu,\"closed\":%d,"
         "\"paced_lost\":%ld,\"p50_ms\":%.3f,\"p99_ms\":%.3f,\"max_ms\":%.3f,\"us_per_resume\":%.1f}\n",
         opened - opt.others, (back ? back - returned : 999000000000ull) / 1e9, (complete ? complete - returned : 999000000000ull) / 1e9, lost, again,
         closed_by_server, (long)(paced * opt.others - delivered), percentile_ms(.5), percentile_ms(.99),
         percentile_ms(1 - 1e-9), cpu / 1e3 / opt.subs);
}

int main(int argc, char **argv) {
  enum { TEXT, NUMBER, REAL };
  static struct { const char *name; int kind; void *where; } known[] = {
      {"port", NUMBER, &opt.port},                  // of the server, on 127.0.0.1
      {"pid", NUMBER, &opt.pid},                    // the root of its process tree
      {"subs", NUMBER, &opt.subs},                  // subscribers
      {"channels", NUMBER, &opt.channels},          // channels that they spread over
      {"size", NUMBER, &opt.size},                  // bytes of payload
      {"path", TEXT, &opt.path},                    // of the upgrade
      {"header", TEXT, &opt.header},                // further request headers, each with its \r\n
      {"binary", NUMBER, &opt.binary},              // 1: binary frames
      {"subscribe", TEXT, &opt.subscribe},          // what a subscriber sends after the upgrade
      {"ready", TEXT, &opt.ready},                  // and what it then waits for
      {"hello", TEXT, &opt.hello},                  // what the publisher sends first
      {"publish", TEXT, &opt.publish},              // one message
      {"http", TEXT, &opt.http},                    // publish by POST to this path
      {"wrap", TEXT, &opt.wrap},                    // the body around the messages (%I) of a batch
      {"ramp", NUMBER, &opt.ramp},                  // connections that come to stand at a time
      {"half", NUMBER, &opt.half},                  // also tell the cost of the first half of the connections
      {"settle", NUMBER, &opt.settle_ms},           // rest before measuring, ms
      {"idle", NUMBER, &opt.idle_runs},             // measure so many spans without any message
      {"idle-ms", NUMBER, &opt.idle_ms},            // how long each is
      {"seconds", REAL, &opt.seconds},              // the longest that a run may take
      {"resume", TEXT, &opt.resume},                // measure resuming: what the answer to a resumed session holds
      {"missed", NUMBER, &opt.missed},              // messages published meanwhile, at most 64
      {"others", NUMBER, &opt.others},              // subscribers that stay
      {"others-subscribe", TEXT, &opt.others_subscribe},
      {"others-publish", TEXT, &opt.others_publish},
  };
  enum { KNOWN = sizeof known / sizeof *known };
  struct option options[KNOWN + 2] = {};
  for (int i = 0; i < KNOWN; i++) options[i] = (struct option){known[i].name, required_argument, NULL, i};
  options[KNOWN] = (struct option){"run", required_argument, NULL, KNOWN};
  for (int i; (i = getopt_long(argc, argv, "", options, NULL)) != -1;) {
    if (i == '?') return 2;
    if (i == KNOWN) {
      if (opt.nruns == MAX_RUNS) errno = 0, die("too many --run");
      opt.runs[opt.nruns++] = parse_run(optarg);
    } else if (known[i].kind == TEXT) *(const char **)known[i].where = optarg;
    else if (known[i].kind == NUMBER) *(int *)known[i].where = atoi(optarg);
    else *(double *)known[i].where = atof(optarg);
  }
  if ((opt.nruns || opt.resume) && !opt.publish) errno = 0, die("--publish is missing");
  if (opt.missed > 64) errno = 0, die("--missed is at most 64");

  int total = opt.subs + opt.others;
  struct rlimit files;
  getrlimit(RLIMIT_NOFILE, &files);
  files.rlim_cur = files.rlim_max;
  setrlimit(RLIMIT_NOFILE, &files);
  conns = calloc(total, sizeof *conns);
  buffer = malloc(READ_SIZE + MARK_LEN + 1);
  loop_fd = epoll_create1(0);

  double pss = server_pss_kb(), cpu = server_cpu_ns(), half_pss = 0, half_cpu = 0;
  uint64_t begun = now_ns();
  if (opt.half) {
    open_all(0, total / 2);
    half_cpu = server_cpu_ns();
    rest(opt.settle_ms);
    half_pss = server_pss_kb();
    cpu += server_cpu_ns() - half_cpu;
  }
  open_all(opt.half ? total / 2 : 0, total);
  double connect_s = (now_ns() - begun) / 1e9;
  double all_cpu = server_cpu_ns();
  rest(opt.settle_ms);
  double all_pss = server_pss_kb();
  printf("{\"kind\":\"connect\",\"connections\":%d,\"seconds\":%.3f,\"us_per_connection\":%.2f,\"kb_per_connection\":%.3f", total,
         connect_s, (all_cpu - cpu) / 1e3 / total, (all_pss - pss) / total);
  if (opt.half) printf(",\"half_kb_per_connection\":%.3f", (half_pss - pss) / (total / 2));
  printf("}\n");
  fflush(stdout);

  measure_idle();
  if (opt.nruns || opt.resume) open_publisher();
  if (opt.resume) measure_resume();
  else
    for (int i = 0; i < opt.nruns; i++) measure(opt.runs[i]), rest(opt.settle_ms / 2);
  return 0;
}
