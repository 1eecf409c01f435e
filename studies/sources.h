#pragma once
// The publications whose claims are studied.

namespace kvplan::studies {

inline constexpr const char* kSourceTurboQuant =
    "Zandieh et al., TurboQuant: Online Vector Quantization with Near-optimal Distortion Rate, "
    "arXiv 2504.19874 (2025)";
inline constexpr const char* kSourceSamak =
    "D. Samak, I Ran the Same Algorithm Ten Times, Towards AI, and its follow-up analysis";
inline constexpr const char* kSourceYogesh =
    "R. Yogesh, evaluation of TurboQuant (10 experiments, 3 models), Towards AI, code "
    "quartzap/turboquant";
inline constexpr const char* kSourceBenchmarksBlog =
    "Blog article Does KV Cache Compression Affect LLM Accuracy? TurboQuant Benchmarks";
inline constexpr const char* kSourceTurboQuantCpp =
    "quantumaikr/TurboQuant.cpp, issue 14 and its resolution (commit ac3c46a)";
inline constexpr const char* kSourceScosLab = "scos-lab/turboquant, README";

}  // namespace kvplan::studies
