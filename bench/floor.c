// floor: the least that any fan-out server has to do on this machine.
//
// One thread, one epoll loop, and no protocol beyond a canned upgrade: what a publisher sends (bytes with the
// marker of load.c) is framed once, with as much around it as a `message` event of bcast.v1 has, and written with
// one send() for each subscriber. With `batch` all messages that one read has brought share that send(). With `pair`
// there are two such processes, each with about half of the subscribers, and what a publisher sends to one of them
// goes to the other through a socket: the least of two workers.
// It checks nothing and cannot serve anybody: it is there to be compared with.
//
// Build: cc -O2 -o floor floor.c      Use: floor PORT [batch | pair]

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#define MAX_FDS 40000
#define IN_SIZE (1 << 20)
// {"type":"message","channel":"b0","data":"...","messageId":"...","timestamp":1700000000000}
#define BEFORE 42
#define AFTER 78

enum { FREE, ACCEPTED, UPGRADED, SUBSCRIBED };

static const char UPGRADE[] =
    "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";

static int subscribers[MAX_FDS], count, other = -1;
static char state[MAX_FDS];

static size_t frame(char *out, const char *payload, size_t size) {
  size_t whole = BEFORE + size + AFTER, head = 0;
  out[head++] = (char)0x81;
  if (whole < 126) {
    out[head++] = whole;
  } else if (whole < 65536) {
    out[head++] = 126, out[head++] = whole >> 8, out[head++] = whole;
  } else {
    out[head++] = 127;
    for (int shift = 56; shift >= 0; shift -= 8) out[head++] = (unsigned long)whole >> shift;
  }
  memset(out + head, ' ', BEFORE);
  memcpy(out + head + BEFORE, payload, size);
  memset(out + head + BEFORE + size, ' ', AFTER);
  return head + whole;
}

static void fan_out(const char *data, size_t size) {
  for (int i = 0; i < count; i++) send(subscribers[i], data, size, MSG_DONTWAIT | MSG_NOSIGNAL);
}

static void forget(int fd) {
  close(fd);
  state[fd] = FREE;
  for (int i = 0; i < count; i++)
    if (subscribers[i] == fd) {
      subscribers[i] = subscribers[--count];
      break;
    }
}

int main(int argc, char **argv) {
  int batch = argc > 2 && !strcmp(argv[2], "batch"), one = 1, pair[2];
  struct rlimit files;
  getrlimit(RLIMIT_NOFILE, &files);
  files.rlim_cur = files.rlim_max;
  setrlimit(RLIMIT_NOFILE, &files);
  if (argc > 2 && !strcmp(argv[2], "pair")) {
    if (socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair)) return perror("floor"), 1;
    int child = fork() == 0;
    other = pair[child];
    close(pair[!child]);
  }
  int listener = socket(AF_INET, SOCK_STREAM, 0);
  setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
  if (other >= 0) setsockopt(listener, SOL_SOCKET, SO_REUSEPORT, &one, sizeof one);
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(0x7f000001)};
  address.sin_port = htons(argc > 1 ? atoi(argv[1]) : 9005);
  if (bind(listener, (void *)&address, sizeof address) || listen(listener, 4096)) return perror("floor"), 1;
  int loop = epoll_create1(0);
  struct epoll_event event = {.events = EPOLLIN, .data.fd = listener}, events[256];
  epoll_ctl(loop, EPOLL_CTL_ADD, listener, &event);
  if (other >= 0) {
    event.data.fd = other;
    epoll_ctl(loop, EPOLL_CTL_ADD, other, &event);
  }
  char *in = malloc(IN_SIZE), *out = malloc(4 * IN_SIZE);

  for (;;) {
    int ready = epoll_wait(loop, events, 256, -1);
    for (int i = 0; i < ready; i++) {
      int fd = events[i].data.fd;
      if (fd == listener) {
        int peer = accept(listener, NULL, NULL);
        if (peer < 0) continue;
        if (peer >= MAX_FDS) {
          close(peer);
          continue;
        }
        setsockopt(peer, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        state[peer] = ACCEPTED;
        event.data.fd = peer;
        epoll_ctl(loop, EPOLL_CTL_ADD, peer, &event);
        continue;
      }
      ssize_t size = recv(fd, in, IN_SIZE, MSG_DONTWAIT);
      if (fd == other) {
        if (size <= 0) return 0;
        fan_out(in, size);
      } else if (size <= 0) {
        forget(fd);
      } else if (state[fd] == ACCEPTED) {
        if (memmem(in, size, "\r\n\r\n", 4)) send(fd, UPGRADE, sizeof UPGRADE - 1, MSG_NOSIGNAL), state[fd] = UPGRADED;
      } else if (state[fd] == UPGRADED && memmem(in, size, "subscribe", 9)) {
        subscribers[count++] = fd;
        state[fd] = SUBSCRIBED;
        send(fd, "\x81\x02{}", 4, MSG_NOSIGNAL);
      } else {
        size_t filled = 0;
        char *end = in + size;
        for (char *mark = in; (mark = memmem(mark, end - mark, "@T", 2));) {
          char *stop = memchr(mark, '"', end - mark);
          if (!stop) stop = end;
          filled += frame(out + filled, mark, stop - mark);
          if (other >= 0) send(other, out, filled, MSG_NOSIGNAL);
          if (!batch) fan_out(out, filled), filled = 0;
          mark = stop;
        }
        if (filled) fan_out(out, filled);
      }
    }
  }
}
