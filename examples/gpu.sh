#!/usr/bin/env bash
# All that is tested and measured on a GPU, in parts: examples/gpu.sh [PART ...]; PYTHON, MODELS and RESULTS may be set.
# The figures go to examples/results/gpu.csv. Every part but `compiled` is meant to take less than ten minutes; all that
# time networks or their layers take MODELS, so that they can be cut smaller. `kernel` are the tests of the layers alone,
# a part of `tests`; `blocks` tries block sizes of the kernels; `measured` says of the rows of `layers` where they win.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-.venv/bin/python}"
results="${RESULTS:-examples/results/gpu.csv}"
train() {
  # shellcheck disable=SC2086  # several words
  "$python" examples/benchmark_train.py ${MODELS:+--models $MODELS} --results "$results" "$@"
}

for part in "${@:-tests kernel blocks layers measured profile steps small inference calibrate discovery compiled}"; do
  for name in $part; do
    echo "== $name"
    case $name in
      tests) "$python" -m pytest -q -m cuda ;;  # with TIMM_SCRIPTS=checkout timm's scripts as well
      kernel) "$python" -m pytest -q -m cuda tests/layers ;;
      profile)
        train --only profile --models convnext_tiny --precision bf16 --channels-last --variants dense shift shift+kernels
        ;;
      steps | small | compiled)
        options=(--only steps)
        [[ $name == small ]] && options+=(--batch-size 8)
        [[ $name == compiled ]] && options+=(--compile)
        for precision in bf16 float32; do
          train "${options[@]}" --precision $precision --channels-last
          train "${options[@]}" --precision $precision
        done
        ;;
      layers | blocks) for precision in bf16 float32; do train --only "$name" --precision $precision; done ;;
      measured) MODELS="" train --only measured ;;  # what layers/gpu_operators.py should take the kernels for
      inference)
        for layout in --channels-last ""; do train --only inference --precision bf16 $layout; done
        ;;
      calibrate) MODELS="" train --only calibrate ;;
      discovery) "$python" examples/benchmark_discover.py --kernels 2500 10000 ;;
      *) echo "no part $name" >&2; exit 1 ;;
    esac
  done
done
