/* Makes the N-th file operation below a folder fail, or kills the process there.
 *
 * Loaded with LD_PRELOAD. FAULT_DIR: the folder. FAULT_AT: which operation, from 1; 0 for none.
 * FAULT_MODE: "kill", "short" (every write writes half, none fails), or the number of an errno.
 * FAULT_LOG: a file that gets one line with the count of operations at exit.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static atomic_int operations;

static int inside(const char *path) {
  const char *folder = getenv("FAULT_DIR");
  return folder && path && strncmp(path, folder, strlen(folder)) == 0;
}

static int inside_fd(int fd) {
  char link[64], path[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return inside(path);
}

/* Counts an operation. Returns whether it must fail, with errno set. */
static int fails(void) {
  int number = atomic_fetch_add(&operations, 1) + 1;
  const char *mode = getenv("FAULT_MODE");
  if (number != atoi(getenv("FAULT_AT")) || !strcmp(mode, "short")) return 0;
  if (!strcmp(mode, "kill")) raise(SIGKILL);
  errno = atoi(mode);
  return 1;
}

static size_t shortened(size_t count) {
  return !strcmp(getenv("FAULT_MODE"), "short") && count > 1 ? count / 2 : count;
}

#define REAL(type, name, ...) ((type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name))

ssize_t write(int fd, const void *data, size_t count) {
  if (inside_fd(fd)) {
    if (fails()) return -1;
    count = shortened(count);
  }
  return REAL(ssize_t, "write", int, const void *, size_t)(fd, data, count);
}

ssize_t pwrite64(int fd, const void *data, size_t count, off64_t offset) {
  if (inside_fd(fd)) {
    if (fails()) return -1;
    count = shortened(count);
  }
  return REAL(ssize_t, "pwrite64", int, const void *, size_t, off64_t)(fd, data, count, offset);
}

int fsync(int fd) {
  if (inside_fd(fd) && fails()) return -1;
  return REAL(int, "fsync", int)(fd);
}

int ftruncate64(int fd, off64_t length) {
  if (inside_fd(fd) && fails()) return -1;
  return REAL(int, "ftruncate64", int, off64_t)(fd, length);
}

int rename(const char *from, const char *to) {
  if (inside(to) && fails()) return -1;
  return REAL(int, "rename", const char *, const char *)(from, to);
}

int unlink(const char *path) {
  if (inside(path) && fails()) return -1;
  return REAL(int, "unlink", const char *)(path);
}

int mkdir(const char *path, mode_t mode) {
  if (inside(path) && fails()) return -1;
  return REAL(int, "mkdir", const char *, mode_t)(path, mode);
}

int open64(const char *path, int flags, ...) {
  va_list arguments;
  va_start(arguments, flags);
  mode_t mode = va_arg(arguments, mode_t);
  va_end(arguments);
  if ((flags & (O_CREAT | O_WRONLY | O_RDWR)) && inside(path) && fails()) return -1;
  return REAL(int, "open64", const char *, int, mode_t)(path, flags, mode);
}

__attribute__((destructor)) static void report(void) {
  const char *log = getenv("FAULT_LOG");
  if (!log) return;
  FILE *file = fopen(log, "w");
  if (!file) return;
  fprintf(file, "%d\n", atomic_load(&operations));
  fclose(file);
}
