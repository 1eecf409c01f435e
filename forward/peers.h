#pragma once
// The processes of one run, on one machine or many, connected by PyTorch's distributed engine
// (c10d: a TCP store to meet at, Gloo to talk). Torch-free.

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace kvplan::forward {

/// Where the processes meet; what torchrun and other launchers put into RANK, WORLD_SIZE,
/// MASTER_ADDR and MASTER_PORT.
struct PeerAddress {
  int rank = 0, size = 1;
  std::string host = "127.0.0.1";
  int port = 29500;
  bool store_running = false;  // the launcher serves the store itself; else rank 0 does
  std::string attempt = "0";   // of the launcher, so that a restart meets nobody of the last one
  std::chrono::seconds timeout{1800};  // of every wait for another process
};

class Peers {
 public:
  /// Waits until all are there. EnvironmentError when they are not within the timeout, or when
  /// kvplan was built without Gloo; ArgumentError for an impossible rank.
  explicit Peers(const PeerAddress& address);
  ~Peers();
  int rank() const { return rank_; }
  int size() const { return size_; }

  /// What a process tells the others after a step.
  struct Report {
    enum class State : std::int32_t { kWorking, kDone, kInterrupted, kFailed, kLost };
    State state = State::kWorking;
    int signal = 0;       // kInterrupted
    std::string message;  // kFailed
  };
  /// Everybody's reports, by rank; one that cannot be reached is kLost. EnvironmentError when rank
  /// 0 is gone.
  std::vector<Report> exchange(const Report& mine);

  /// From any other rank to rank 0, and from rank 0 to all. EnvironmentError when the other side is
  /// gone.
  void send_to_first(std::span<const std::byte> bytes);
  std::vector<std::byte> receive_from(int rank);
  std::vector<std::byte> broadcast(std::vector<std::byte> from_first);

 private:
  struct Connection;
  void send(std::span<const std::byte> bytes, int to);
  void receive(std::span<std::byte> bytes, int from);
  [[noreturn]] void lost(int peer, const std::string& reason) const;

  int rank_, size_;
  std::unique_ptr<Connection> connection_;
};

/// Calls step() until it answers that nothing is left. With peers all processes do, and after each
/// step they hear of each other: when one was interrupted, all throw InterruptedError; when one
/// failed, it throws its own error and the others EnvironmentError with its message.
void in_lockstep(Peers* peers, const std::function<bool()>& step);

/// First and end of the part of `count` items, cut at multiples of `unit`, that falls to a process.
/// ArgumentError when there is not a unit for each.
std::pair<std::size_t, std::size_t> share_of(int rank, int size, std::size_t count,
                                             std::size_t unit);

}  // namespace kvplan::forward
