// Several processes of one run, here as threads that meet over loopback. tests/cli/test_peers.py
// starts real ones.

#include "forward/peers.h"

#include <arpa/inet.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <filesystem>
#include <functional>
#include <limits>
#include <thread>

#include "calib/profiler.h"
#include "evaluation/evaluator.h"
#include "quant/baselines.h"
#include "schemas/error.h"
#include "tests/calib/tiny_profile.h"
#include "tests/temporary_folder.h"

namespace kvplan {
namespace {

namespace fs = std::filesystem;
using testing::HasSubstr;
/// What nobody catches in a real process: its sockets close without a word.
struct Death {};

/// A port that nothing listens on.
int free_port() {
  const int fd = ::socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof address;
  ::bind(fd, reinterpret_cast<sockaddr*>(&address), size);
  ::getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size);
  ::close(fd);
  return ntohs(address.sin_port);
}

class PeersTest : public testing::TestWithParam<int> {
 protected:
  /// Runs `work` for every rank; returns what() of the errors, empty where there was none.
  static std::vector<std::string> together(int size,
                                           const std::function<void(forward::Peers&)>& work) {
    const int port = free_port();
    std::vector<std::string> errors(static_cast<std::size_t>(size));
    std::vector<std::jthread> threads;
    for (int rank = 0; rank < size; ++rank)
      threads.emplace_back([&, rank] {
        try {
          forward::Peers peers({.rank = rank,
                                .size = size,
                                .host = "127.0.0.1",
                                .port = port,
                                .timeout = std::chrono::seconds(60)});
          work(peers);
        } catch (const InterruptedError& error) {
          errors[static_cast<std::size_t>(rank)] =
              "signal " + std::to_string(error.signal()) + ": " + error.what();
        } catch (const std::exception& error) {
          errors[static_cast<std::size_t>(rank)] = error.what();
        } catch (const Death&) {
        }
      });
    threads.clear();
    return errors;
  }
  static std::vector<std::string> none(int size) {
    return std::vector<std::string>(static_cast<std::size_t>(size));
  }

  static calib::ProfileOptions options() {
    calib::ProfileOptions options;
    options.window = calib::kWindow;
    options.sink_tokens = calib::kSinks;
    options.coherent_windows = 9;
    options.batch = 2;
    options.threads = 1;
    return options;
  }
  void profile(const std::string& name, forward::Peers* peers, const RunControl& control = {},
               const models::ModelReader* other = nullptr) const {
    calib::ProfileOptions with = options();
    with.peers = peers;
    calib::run_profile(other ? *other : model_, windows_, sources_, with, root_ / name, control);
  }

  const TemporaryFolder folder_;
  const fs::path root_ = folder_.path();
  const models::TinyModel model_{calib::small_config(2)};
  const std::vector<tokenizers::TextWindow> windows_ = calib::random_windows(21);
  const std::vector<ProfileSource> sources_ = {{"text.txt", std::string(64, 'b'), 1000, 0, 1, 1}};
};

INSTANTIATE_TEST_SUITE_P(Processes, PeersTest, testing::Values(2, 4));

TEST_P(PeersTest, ProfileHasTheBytesOfOneProcess) {
  profile("one", nullptr);
  EXPECT_EQ(together(GetParam(), [&](forward::Peers& peers) { profile("many", &peers); }),
            none(GetParam()));
  for (const char* file : {"profile.json", "profile.safetensors"})
    EXPECT_EQ(file_bytes(root_ / "many" / file), file_bytes(root_ / "one" / file)) << file;
  EXPECT_FALSE(file_bytes(root_ / "one" / "profile.json").empty());
  EXPECT_FALSE(fs::exists(root_ / "many" / "checkpoint"));
}

TEST_P(PeersTest, InterruptOfOneStopsAllAndTheyContinue) {
  profile("one", nullptr);
  const auto errors = together(GetParam(), [&](forward::Peers& peers) {
    RunControl control;
    std::int64_t done = 0;
    control.progress = [&](const Progress& p) { done = p.done; };
    if (peers.rank() == 1) control.stop_signal = [&] { return done >= 2 ? 15 : 0; };
    profile("many", &peers, control);
  });
  for (const std::string& error : errors) {
    EXPECT_THAT(error, HasSubstr("signal 15"));
    EXPECT_THAT(error, HasSubstr("the same command continues from here"));
  }
  // Another number of processes would share the windows otherwise.
  for (const std::string& error :
       together(GetParam() + 1, [&](forward::Peers& p) { profile("many", &p); }))
    EXPECT_THAT(error, HasSubstr("start as many as before"));
  EXPECT_THROW(profile("many", nullptr), InputError);

  std::atomic<std::int64_t> least = 100;
  EXPECT_EQ(together(GetParam(),
                     [&](forward::Peers& peers) {
                       RunControl control;
                       bool first = true;
                       control.progress = [&](const Progress& p) {
                         if (std::exchange(first, false)) least = std::min(least.load(), p.done);
                       };
                       profile("many", &peers, control);
                     }),
            none(GetParam()));
  EXPECT_GE(least, 2) << "did not continue";
  EXPECT_EQ(file_bytes(root_ / "many" / "profile.safetensors"),
            file_bytes(root_ / "one" / "profile.safetensors"));
}

TEST_P(PeersTest, FailureOfOneStopsAllWithItsMessage) {
  models::TinyModel damaged(calib::small_config(2));
  damaged.spoil("blk.1.attn_k.weight", 0, std::numeric_limits<float>::infinity());
  const auto errors = together(GetParam(), [&](forward::Peers& peers) {
    profile("many", &peers, {}, peers.rank() == 1 ? &damaged : nullptr);
  });
  for (std::size_t rank = 0; rank < errors.size(); ++rank) {
    EXPECT_THAT(errors[rank], HasSubstr("layers.1.k"));
    if (rank != 1) {
      EXPECT_THAT(errors[rank], HasSubstr("rank 1 of"));
    }
  }
  EXPECT_FALSE(fs::exists(root_ / "many" / "profile.json"));
}

TEST_P(PeersTest, ProcessThatIsGoneIsNamed) {
  const int lost = GetParam() - 1;
  const auto errors = together(GetParam(), [&](forward::Peers& peers) {
    int steps = 0;
    forward::in_lockstep(&peers, [&] {
      if (peers.rank() == lost && ++steps == 2) throw Death();
      return true;
    });
  });
  for (int rank = 0; rank < lost; ++rank)
    EXPECT_THAT(errors[static_cast<std::size_t>(rank)],
                HasSubstr("rank " + std::to_string(lost) + " of"));
}

TEST_P(PeersTest, ScoresAreThoseOfOneProcess) {
  models::ModelConfig config = calib::small_config(2);
  config.head_dim = config.rotary_dim = 32;  // q8_0 has blocks of 32
  const models::TinyModel model(config);
  std::vector<tokenizers::TextWindow> windows;
  for (std::int64_t i = 0; i < 5; ++i) {
    windows.push_back({i, 0, {}});
    for (const tokenizers::TextWindow& piece : calib::random_windows(4, 4 * i))
      windows.back().tokens.insert(windows.back().tokens.end(), piece.tokens.begin(),
                                   piece.tokens.end());
  }
  const PlanBundle bundle = quant::baseline_plan("q8_0", model.spec(), calib::kSinks, 256, 0,
                                                 models::rotary_frequencies(config));
  evaluation::EvaluateOptions options;
  options.window = 4 * calib::kWindow;
  options.threads = 1;
  const auto score = [&](forward::Peers* peers) {
    evaluation::EvaluateOptions with = options;
    with.peers = peers;
    with.partial_file = root_ / "partial";
    const evaluation::EvaluationState state =
        evaluation::score_tokens(model, windows, {{"q8_0", &bundle}}, with, {});
    EXPECT_TRUE(fs::exists(evaluation::own_partial_file(with)));
    return state;
  };
  const evaluation::EvaluationState expected = score(nullptr);
  EXPECT_EQ(together(GetParam(),
                     [&](forward::Peers& peers) {
                       const evaluation::EvaluationState found = score(&peers);
                       EXPECT_EQ(found.windows(), 5);
                       EXPECT_EQ(found.reference_nll.values, expected.reference_nll.values);
                       EXPECT_EQ(found.passes.at(0).kl.values, expected.passes.at(0).kl.values);
                     }),
            none(GetParam()));
}

TEST(Peers, ImpossibleRanksAndMissingProcessesAreRefused) {
  EXPECT_THROW(forward::Peers({.rank = 2, .size = 2}), ArgumentError);
  EXPECT_THROW(forward::Peers({.rank = -1, .size = 2}), ArgumentError);
  EXPECT_THROW(forward::share_of(0, 4, 6, 2), ArgumentError);
  try {
    forward::Peers({.rank = 1, .size = 2, .port = free_port(), .timeout = std::chrono::seconds(1)});
    FAIL() << "met nobody";
  } catch (const EnvironmentError& error) {
    EXPECT_THAT(error.what(), HasSubstr("cannot meet at 127.0.0.1"));
  }
}

TEST(Peers, SharesCoverEverythingInWholeBatches) {
  for (const std::size_t count : {7u, 8u, 21u})
    for (const std::size_t unit : {1u, 2u})
      for (int size = 1; size <= 4; ++size) {
        std::size_t next = 0;
        for (int rank = 0; rank < size; ++rank) {
          const auto [begin, end] = forward::share_of(rank, size, count, unit);
          EXPECT_EQ(begin, next);
          EXPECT_LT(begin, end);
          EXPECT_EQ(begin % unit, 0u);
          next = end;
        }
        EXPECT_EQ(next, count);
      }
}

}  // namespace
}  // namespace kvplan
