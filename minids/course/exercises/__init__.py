"""The exercises of each chapter: references, mistakes and bugs. No student's process can open this folder."""

NAMES = {
    0: "00_claims",
    1: "01_baseline",
    2: "02_mla",
    3: "03_moe",
    4: "04_mtp",
    5: "05_pretraining",
    6: "06_fp8",
    7: "07_dualpipe",
    8: "08_expert_parallel",
    9: "09_r1_zero",
    10: "10_r1",
    11: "11_sparse_attention",
    12: "12_after_v3",
    13: "13_multi_gpu",
}
