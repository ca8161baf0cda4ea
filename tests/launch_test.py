# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""The launch scripts, with stand-ins for the programs of a cluster."""

from __future__ import annotations

import os
import pathlib
import string
import subprocess

import pytest
import yaml

ROOT = pathlib.Path(__file__).parent.parent
LAUNCH = ROOT / 'launch'


@pytest.fixture
def cluster(tmp_path):
  """A folder of stand-ins; each writes down its arguments."""
  folder = tmp_path / 'bin'
  folder.mkdir()

  def make(name, script):
    file = folder / name
    file.write_text(
        f'#!/usr/bin/env bash\necho "{name} $*" >> {tmp_path}/calls\n{script}\n'
    )
    file.chmod(0o755)

  def run(*command, **variables):
    return subprocess.run(
        command, cwd=tmp_path, text=True, capture_output=True, check=False,
        timeout=60, env=os.environ | {
            'PATH': f'{folder}:{os.environ["PATH"]}', 'RETRY_SECONDS': '0',
            'HOME': str(tmp_path), **variables,
        },
    )

  make.run = run
  make.calls = lambda: (tmp_path / 'calls').read_text().splitlines()
  # The next status of a list, the last one for ever.
  make.next = lambda statuses: (
      f'n=$(cat {tmp_path}/n 2>/dev/null || echo 0); echo $((n + 1)) > '
      f'{tmp_path}/n; s=({statuses}); exit ${{s[$n]:-${{s[-1]}}}}'
  )
  return make


@pytest.mark.parametrize(
    'script', sorted(p.name for p in LAUNCH.iterdir() if p.suffix != '.yaml')
)
def test_shell_scripts_parse_and_can_be_run(script):
  subprocess.run(['bash', '-n', LAUNCH / script], check=True)
  assert os.access(LAUNCH / script, os.X_OK)


@pytest.mark.parametrize('statuses, runs, status', [
    ('143 75 134 0', 4, 0), ('1', 1, 1), ('2', 1, 2), ('75 1', 2, 1),
    ('143', 3, 143),
])
def test_what_is_tried_again(cluster, statuses, runs, status):
  cluster('work', cluster.next(statuses))
  result = cluster.run(
      LAUNCH / 'preemptible.sh', 'work', 'a b', MAX_RESTARTS='2'
      if statuses == '143' else '100',
  )
  assert result.returncode == status
  assert cluster.calls() == ['work a b'] * runs


def test_tpu_vm_runs_on_every_worker_and_comes_back(cluster, tmp_path):
  (tmp_path / 'dd_jax').mkdir()
  (tmp_path / 'dd_jax/launch').symlink_to(LAUNCH)
  for name in ('venv', 'other'):
    (tmp_path / name).mkdir()
    (tmp_path / name / 'bin').symlink_to(tmp_path / 'bin')
  # A worker: what ssh is told to do, in a home of its own. Variables of this
  # side do not get there.
  cluster('gcloud', '''
for a in "$@"; do
  if [[ $a == --command=* ]]; then
    cd
    exec env -i HOME="$HOME" PATH=/usr/bin:/bin bash -c "${a#--command=}"
  fi
done''')
  cluster('python', f'''
n=$(cat {tmp_path}/n 2>/dev/null || echo 0); echo $((n + 1)) > {tmp_path}/n
echo "run $n of $0 with $*"
s=(143 75 0); exit "${{s[$n]}}"''')
  stopped = cluster.run(
      LAUNCH / 'tpu_vm.sh', 'v', 'z', '--config=a b', MAX_RESTARTS='0'
  )
  assert stopped.returncode == 143, stopped.stderr
  (log,) = (tmp_path / 'dd_jax').glob('*.log')
  assert (f'run 0 of {tmp_path}/venv/bin/python with -m dd_jax.main '
          '--config=a b') in log.read_text()
  assert 'giving up' in log.read_text()
  result = cluster.run(
      LAUNCH / 'tpu_vm.sh', 'v', 'z', '--config=a b', VENV='~/other'
  )
  assert result.returncode == 0, result.stderr
  assert 'status 75; restarting' in log.read_text()
  assert f'run 2 of {tmp_path}/other/bin/python with' in log.read_text()
  calls = [c for c in cluster.calls() if c.startswith('gcloud')]
  assert all('--zone=z' in c and ' v ' in c for c in calls)
  assert '--worker=all' in calls[0]


def test_tpu_vm_waits_for_a_vm_that_is_gone(cluster, tmp_path):
  cluster('gcloud', f'''
case "$*" in
  *describe*) cat {tmp_path}/state 2>/dev/null || exit 1 ;;
  *ssh*) [[ -e {tmp_path}/state ]] || exit 255 ;;
esac''')
  result = cluster.run(
      LAUNCH / 'tpu_vm.sh', 'v', 'z',
      RECREATE=f'echo READY > {tmp_path}/state',
  )
  assert result.returncode == 0, result.stderr
  assert 'v is GONE' in result.stderr
  kinds = [c.split()[4] for c in cluster.calls()]
  assert kinds == ['ssh', 'describe', 'describe', 'ssh']
  assert cluster.run(LAUNCH / 'tpu_vm.sh', 'v').returncode == 2


@pytest.mark.parametrize('status, requeued', [
    (0, False), (1, False), (143, True), (75, True), (137, True),
])
def test_slurm_requeues_what_can_go_on(cluster, status, requeued):
  cluster('srun', 'exec "${@:3}"')
  cluster('python', f'exit {status}')
  cluster('scontrol', '')
  result = cluster.run(
      'bash', LAUNCH / 'gpu_slurm.sbatch', '--config=a b', SLURM_JOB_ID='7'
  )
  assert result.returncode == status
  calls = [c for c in cluster.calls() if not c.startswith(' ')]
  assert calls[0].startswith('srun --kill-on-bad-exit=0 --cpus-per-task=8 bash')
  calls = [c for c in calls if c.startswith(('python', 'scontrol'))]
  assert calls[0] == 'python -m dd_jax.main --config=a b'
  assert calls[1:] == ['scontrol requeue 7'] * requeued
  again = cluster.run(
      'bash', LAUNCH / 'gpu_slurm.sbatch', SLURM_JOB_ID='7',
      SLURM_RESTART_COUNT='100',
  )
  assert again.returncode == status
  assert sum('requeue' in c for c in cluster.calls()) == requeued


def test_slurm_hands_a_signal_on(cluster, tmp_path):
  """Slurm tells the tasks alone, not what they have started."""
  cluster('srun', f'''
exec 3>&1
"${{@:3}}" &
while [[ ! -e {tmp_path}/begun ]]; do sleep 0.05; done
kill -TERM $!
wait $!''')
  cluster('python', f'''
trap "sleep 0.3; touch {tmp_path}/saved; exit 143" TERM
touch {tmp_path}/begun
for i in $(seq 100); do sleep 0.1; done''')
  cluster('scontrol', '')
  result = cluster.run(
      'bash', LAUNCH / 'gpu_slurm.sbatch', '--config=c', SLURM_JOB_ID='7'
  )
  assert (tmp_path / 'saved').exists()
  assert result.returncode == 143
  assert any('requeue 7' in c for c in cluster.calls())


@pytest.mark.parametrize('mistake', [1, 2])
def test_slurm_ends_where_one_of_the_processes_has_a_mistake(
    cluster, tmp_path, mistake
):
  # As srun does, with the highest status of its tasks.
  cluster('srun', '"${@:3}"; "${@:3}"; s=$?; ((s > 2)) || s=75; exit $s')
  cluster('python', cluster.next(f'75 {mistake}'))
  cluster('scontrol', '')
  result = cluster.run(
      'bash', LAUNCH / 'gpu_slurm.sbatch', '--config=c', SLURM_JOB_ID='7'
  )
  assert result.returncode == mistake
  assert not any('requeue' in c for c in cluster.calls())
  assert not list(tmp_path.glob('*.mistake'))


def test_jobset_is_whole():
  text = (LAUNCH / 'gke_jobset.yaml').read_text()
  names = dict(
      NAME='digits', IMAGE='image', BUCKET='bucket', COMMAND='--config=c'
  )
  made = yaml.safe_load(string.Template(text).substitute(names))
  assert (made['kind'], made['metadata']['name']) == ('JobSet', 'digits')
  (jobs,) = made['spec']['replicatedJobs']
  job = jobs['template']['spec']
  pod = job['template']['spec']
  (container,) = pod['containers']
  rows, columns = map(
      int, pod['nodeSelector'][
          'cloud.google.com/gke-tpu-topology'].split('x')
  )
  chips = job['parallelism'] * container['resources']['limits'][
      'google.com/tpu']
  assert job['parallelism'] == job['completions']
  assert rows * columns == chips
  assert container['command'] == [
      'bash', '-c', 'exec python -m dd_jax.main --config=c'
  ]
  (rule,) = job['podFailurePolicy']['rules']
  assert rule['onExitCodes']['containerName'] == container['name']
  assert set(rule['onExitCodes']['values']) == {1, 2}
  volumes = {v['name'] for v in pod['volumes']}
  assert {m['name'] for m in container['volumeMounts']} == volumes
