#include "forward/peers.h"

#include <algorithm>
#include <cstring>
#include <exception>

#include "schemas/error.h"

#ifdef KVPLAN_GLOO
#include <ATen/ops/from_blob.h>

#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>
#endif

namespace kvplan::forward {
namespace {

using State = Peers::Report::State;

constexpr std::size_t kMessageBytes = 1000;

/// A report on the wire.
struct Packet {
  State state = State::kWorking;
  std::int32_t signal = 0;
  char message[kMessageBytes] = {};
};

Packet pack(const Peers::Report& report) {
  Packet packet{.state = report.state, .signal = report.signal};
  std::memcpy(packet.message, report.message.data(),
              std::min(report.message.size(), kMessageBytes - 1));
  return packet;
}

Peers::Report unpack(Packet packet) {
  packet.message[kMessageBytes - 1] = 0;
  return {packet.state, packet.signal, packet.message};
}

std::span<std::byte> bytes_of(auto& value) { return std::as_writable_bytes(std::span(&value, 1)); }

std::string rank_name(int rank, int size) {
  return "rank " + std::to_string(rank) + " of " + std::to_string(size);
}

}  // namespace

#ifdef KVPLAN_GLOO

namespace {

/// LibTorch's errors end in a trace of C++ frames.
std::string first_line(const std::exception& error) {
  const std::string text = error.what();
  return text.substr(0, text.find('\n'));
}

}  // namespace

struct Peers::Connection {
  c10::intrusive_ptr<c10d::Store> store;
  c10::intrusive_ptr<c10d::ProcessGroupGloo> group;
};

Peers::Peers(const PeerAddress& address) : rank_(address.rank), size_(address.size) {
  if (size_ < 1 || rank_ < 0 || rank_ >= size_)
    throw ArgumentError("rank " + std::to_string(rank_) + " of " + std::to_string(size_) +
                        " processes is impossible; check RANK and WORLD_SIZE");
  const std::chrono::milliseconds timeout = address.timeout;
  try {
    c10d::TCPStoreOptions options;
    options.port = static_cast<std::uint16_t>(address.port);
    options.isServer = rank_ == 0 && !address.store_running;
    options.numWorkers = static_cast<std::size_t>(size_);
    options.waitWorkers = !address.store_running;
    options.timeout = timeout;
    const auto store = c10::make_intrusive<c10d::TCPStore>(address.host, options);
    connection_ = std::make_unique<Connection>();
    connection_->store = c10::make_intrusive<c10d::PrefixStore>("kvplan/" + address.attempt, store);
    connection_->group = c10::make_intrusive<c10d::ProcessGroupGloo>(
        connection_->store, rank_, size_, c10d::ProcessGroupGloo::Options::create_default(timeout));
    exchange({});  // all are connected: the store of rank 0 may go when it fails
  } catch (const std::exception& error) {
    throw EnvironmentError(rank_name(rank_, size_),
                           "the processes of this run cannot meet at " + address.host + ":" +
                               std::to_string(address.port) + ": " + first_line(error) +
                               "; check MASTER_ADDR, MASTER_PORT, WORLD_SIZE and that all of them "
                               "were started");
  }
}

void Peers::send(std::span<const std::byte> bytes, int to) {
  std::vector<at::Tensor> tensor = {at::from_blob(
      const_cast<std::byte*>(bytes.data()), {static_cast<std::int64_t>(bytes.size())}, at::kByte)};
  try {
    connection_->group->send(tensor, to, 0)->wait();
  } catch (const std::exception& error) {
    lost(to, first_line(error));
  }
}

void Peers::receive(std::span<std::byte> bytes, int from) {
  std::vector<at::Tensor> tensor = {
      at::from_blob(bytes.data(), {static_cast<std::int64_t>(bytes.size())}, at::kByte)};
  try {
    connection_->group->recv(tensor, from, 0)->wait();
  } catch (const std::exception& error) {
    lost(from, first_line(error));
  }
}

#else

struct Peers::Connection {};

Peers::Peers(const PeerAddress& address) : rank_(address.rank), size_(address.size) {
  throw EnvironmentError("peers",
                         "this kvplan was built without the headers of Gloo (libgloo-dev), so it "
                         "runs as one process; build it with them, or unset WORLD_SIZE");
}

void Peers::send(std::span<const std::byte>, int to) { lost(to, "no connection"); }
void Peers::receive(std::span<std::byte>, int from) { lost(from, "no connection"); }

#endif

Peers::~Peers() = default;

void Peers::lost(int peer, const std::string& reason) const {
  throw EnvironmentError(rank_name(rank_, size_),
                         "lost " + rank_name(peer, size_) + " (" + reason +
                             "); see its own output, then start all processes again: finished "
                             "windows are kept");
}

// A star: rank 0 hears everybody, then tells everybody. So it knows which one is missing.
std::vector<Peers::Report> Peers::exchange(const Report& mine) {
  std::vector<Packet> packets(static_cast<std::size_t>(size_));
  const auto all = std::as_writable_bytes(std::span(packets));
  if (rank_ != 0) {
    packets.front() = pack(mine);
    send(bytes_of(packets.front()), 0);
    receive(all, 0);
  } else {
    packets.front() = pack(mine);
    for (int peer = 1; peer < size_; ++peer) {
      Packet& packet = packets[static_cast<std::size_t>(peer)];
      try {
        receive(bytes_of(packet), peer);
      } catch (const EnvironmentError& error) {
        packet = pack({State::kLost, 0, error.what()});
      }
    }
    for (int peer = 1; peer < size_; ++peer) {
      Packet& packet = packets[static_cast<std::size_t>(peer)];
      if (packet.state == State::kLost) continue;
      try {
        send(all, peer);
      } catch (const EnvironmentError& error) {
        packet = pack({State::kLost, 0, error.what()});
      }
    }
  }
  std::vector<Report> reports;
  for (const Packet& packet : packets) reports.push_back(unpack(packet));
  return reports;
}

void Peers::send_to_first(std::span<const std::byte> bytes) {
  auto size = static_cast<std::int64_t>(bytes.size());
  send(bytes_of(size), 0);
  if (size > 0) send(bytes, 0);
}

std::vector<std::byte> Peers::receive_from(int rank) {
  std::int64_t size = 0;
  receive(bytes_of(size), rank);
  std::vector<std::byte> bytes(static_cast<std::size_t>(size));
  if (size > 0) receive(bytes, rank);
  return bytes;
}

std::vector<std::byte> Peers::broadcast(std::vector<std::byte> from_first) {
  if (rank_ != 0) return receive_from(0);
  for (int peer = 1; peer < size_; ++peer) {
    auto size = static_cast<std::int64_t>(from_first.size());
    send(bytes_of(size), peer);
    if (size > 0) send(from_first, peer);
  }
  return from_first;
}

void in_lockstep(Peers* peers, const std::function<bool()>& step) {
  if (!peers) {
    while (step()) {
    }
    return;
  }
  for (bool working = true;;) {
    Peers::Report mine{.state = State::kDone, .signal = 0, .message = {}};
    std::exception_ptr failure;
    try {
      if (working && (working = step())) mine.state = State::kWorking;
    } catch (const InterruptedError& interrupted) {
      mine = {State::kInterrupted, interrupted.signal(), {}};
      failure = std::current_exception();
    } catch (const std::exception& error) {
      mine = {State::kFailed, 0, error.what()};
      failure = std::current_exception();
    }
    std::vector<Peers::Report> reports;
    try {
      reports = peers->exchange(mine);
    } catch (const EnvironmentError&) {
      if (!failure) throw;  // its own error says more
    }
    if (failure) std::rethrow_exception(failure);

    const auto find = [&](State state) {
      return std::ranges::find(reports, state, &Peers::Report::state);
    };
    for (const State state : {State::kFailed, State::kLost}) {
      const auto found = find(state);
      if (found == reports.end()) continue;
      throw EnvironmentError(
          rank_name(static_cast<int>(found - reports.begin()), peers->size()),
          (state == State::kFailed ? "failed, so all stop: " : "is gone, so all stop: ") +
              found->message);
    }
    if (const auto found = find(State::kInterrupted); found != reports.end())
      throw InterruptedError(found->signal, "interrupted together with another process");
    if (std::ranges::all_of(reports, [](const auto& r) { return r.state == State::kDone; })) return;
  }
}

std::pair<std::size_t, std::size_t> share_of(int rank, int size, std::size_t count,
                                             std::size_t unit) {
  const std::size_t units = (count + unit - 1) / unit;
  const auto parts = static_cast<std::size_t>(size), part = static_cast<std::size_t>(rank);
  if (units < parts)
    throw ArgumentError(std::to_string(size) + " processes cannot share " + std::to_string(units) +
                        " batches of windows; start at most so many, or give more text or a "
                        "smaller --batch");
  return {part * units / parts * unit, std::min(count, (part + 1) * units / parts * unit)};
}

}  // namespace kvplan::forward
