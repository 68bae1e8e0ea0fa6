#!/usr/bin/env bash
# Packages, megabytes and seconds of the base install and of the demo's, in new environments.
# Writes results/install.json.
set -euo pipefail
cd "$(dirname "$0")/../.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
rows=""
for extra in "" "[demo]"; do
  python3 -m venv "$work/env"
  "$work/env/bin/pip" install --quiet --upgrade pip
  start=$(date +%s)
  "$work/env/bin/pip" install --quiet torch==2.13.0
  "$work/env/bin/pip" install --quiet ".$extra"
  seconds=$(($(date +%s) - start))
  packages=$("$work/env/bin/pip" list --format=freeze | wc -l)
  megabytes=$(du -sm "$work/env" | cut -f1)
  torch=$("$work/env/bin/python" -c "import torch; print(torch.__version__)")
  rows="$rows${rows:+, }{\"what\": \"prunekit$extra\", \"packages\": $packages, \"megabytes\": $megabytes, \"seconds\": $seconds, \"torch\": \"$torch\"}"
  rm -rf "$work/env"
done
mkdir -p benchmarks/install/results
printf '{"installs": [%s]}\n' "$rows" | python3 -m json.tool > "$work/install.json"
mv "$work/install.json" benchmarks/install/results/install.json
cat benchmarks/install/results/install.json
