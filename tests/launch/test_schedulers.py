"""launch/slurm.sh and launch/kubernetes.yaml, without a cluster."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).resolve().parents[2] / 'launch'
# The fields of these objects (Kubernetes 1.34) that a file like ours may use.
SCHEMA = {
  'ServiceSpec': {
    'clusterIP',
    'publishNotReadyAddresses',
    'selector',
    'ports',
    'type',
  },
  'JobSpec': {
    'activeDeadlineSeconds',
    'backoffLimit',
    'backoffLimitPerIndex',
    'completionMode',
    'completions',
    'maxFailedIndexes',
    'parallelism',
    'podFailurePolicy',
    'podReplacementPolicy',
    'suspend',
    'template',
    'ttlSecondsAfterFinished',
  },
  'PodSpec': {
    'containers',
    'nodeSelector',
    'priorityClassName',
    'restartPolicy',
    'schedulerName',
    'serviceAccountName',
    'subdomain',
    'terminationGracePeriodSeconds',
    'tolerations',
    'volumes',
  },
  'Container': {
    'args',
    'command',
    'env',
    'image',
    'name',
    'ports',
    'resources',
    'volumeMounts',
    'workingDir',
  },
  'PodFailurePolicyRule': {'action', 'onExitCodes', 'onPodConditions'},
  'Volume': {'name', 'emptyDir', 'persistentVolumeClaim'},
  'VolumeMount': {'mountPath', 'name', 'readOnly', 'subPath'},
}


@pytest.fixture(scope='module')
def objects():
  text = (LAUNCH / 'kubernetes.yaml').read_text()
  service, job = yaml.safe_load_all(text)
  return service, job


def check(kind, fields):
  assert set(fields) <= SCHEMA[kind], kind


def test_the_kubernetes_file_has_fields_that_exist(objects):
  service, job = objects
  assert (service['apiVersion'], service['kind']) == ('v1', 'Service')
  assert (job['apiVersion'], job['kind']) == ('batch/v1', 'Job')
  check('ServiceSpec', service['spec'])
  check('JobSpec', job['spec'])
  assert set(job['spec']['template']) == {'metadata', 'spec'}
  pod = job['spec']['template']['spec']
  check('PodSpec', pod)
  for container in pod['containers']:
    check('Container', container)
    for mount in container['volumeMounts']:
      check('VolumeMount', mount)
  for volume in pod['volumes']:
    check('Volume', volume)
  for rule in job['spec']['podFailurePolicy']['rules']:
    check('PodFailurePolicyRule', rule)


def test_the_pods_find_each_other(objects):
  service, job = objects
  spec, pod = job['spec'], job['spec']['template']['spec']
  name, host = job['metadata']['name'], service['metadata']['name']
  assert service['spec']['clusterIP'] == 'None'
  assert service['spec']['selector'] == {'job-name': name}
  assert pod['subdomain'] == host
  assert spec['completionMode'] == 'Indexed'  # sets JOB_COMPLETION_INDEX
  (container,) = pod['containers']
  shell, option, line = container['command']
  assert (shell, option) == ('sh', '-c')
  command = shlex.split(line)
  assert command[:3] == ['exec', 'python', 'launch/main.py']
  flags = dict(flag.partition('=')[::2] for flag in command[3:])
  port = container['ports'][0]['containerPort']
  assert flags['--coordinator'] == f'{name}-0.{host}:{port}'
  assert int(flags['--num_processes']) == spec['completions']
  assert spec['parallelism'] == spec['completions']
  assert flags['--process_id'] == '$JOB_COMPLETION_INDEX'
  defined = re.findall(
    r"DEFINE_\w+\(\s*'(\w+)'", (LAUNCH / 'main.py').read_text()
  )
  assert {f[2:].partition('.')[0] for f in flags} <= set(defined)


def test_failed_pods_are_replaced_unless_the_command_is_wrong(objects):
  spec = objects[1]['spec']
  pod = spec['template']['spec']
  # podFailurePolicy needs Never; volumes and mounts must match.
  assert pod['restartPolicy'] == 'Never'
  assert spec['backoffLimit'] >= 10 * spec['completions']
  failing, ignored = spec['podFailurePolicy']['rules']
  assert failing['action'] == 'FailJob'
  assert failing['onExitCodes']['values'] == [2]
  assert failing['onExitCodes']['containerName'] == pod['containers'][0]['name']
  assert ignored['action'] == 'Ignore'
  mounts = pod['containers'][0]['volumeMounts']
  assert {m['name'] for m in mounts} == {v['name'] for v in pod['volumes']}


def test_the_slurm_script_is_clean():
  script = LAUNCH / 'slurm.sh'
  subprocess.run(['bash', '-n', script], check=True)
  beside_python = str(Path(sys.executable).parent)
  shellcheck = shutil.which('shellcheck', path=beside_python) or shutil.which(
    'shellcheck'
  )
  assert shellcheck, 'expected shellcheck of the extra test on PATH'
  done = subprocess.run(
    [shellcheck, script], capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stdout


def test_the_slurm_options_stand_before_the_first_command():
  # sbatch reads no option behind it.
  lines = (LAUNCH / 'slurm.sh').read_text().splitlines()
  head = lines[: lines.index('set -uo pipefail')]
  options = [x.split()[1] for x in head if x.startswith('#SBATCH ')]
  assert len(options) == sum('#SBATCH' in line for line in lines)
  assert '--requeue' in options
  assert any(x.startswith('--signal=B:USR1@') for x in options)


@pytest.fixture
def cluster(tmp_path):
  """A folder of commands that note how they were called."""
  commands = {
    'scontrol': '#!/bin/sh\necho scontrol "$@" >> calls\n',
    # To the whole task: Python and the shell in front of it.
    'scancel': '#!/bin/sh\necho scancel "$@" >> calls\n'
    'kill -TERM $(cat pids)\n',
    # One task after another, for each of $CODES; the highest code is its own.
    'srun': '#!/bin/bash\necho srun "${@:1:3}" >> calls\nhighest=0\n'
    'for code in $CODES; do\n'
    '  CODE=$code "${@:4}"\n  status=$?\n'
    '  if ((status > highest)); then highest=$status; fi\n'
    'done\nexit "$highest"\n',
    # Leaves with $CODE, or waits for a signal and leaves with 143.
    'python': '#!/bin/sh\necho python "$@" >> calls\n'
    '[ "$CODE" = wait ] || exit "$CODE"\n'
    "trap 'exit 143' TERM\necho $$ $PPID > pids\n"
    'while :; do sleep 0.05; done\n',
  }
  for name, text in commands.items():
    (tmp_path / name).write_text(text)
    (tmp_path / name).chmod(0o755)
  return tmp_path


def submit(cluster, **variables):
  environment = os.environ | {
    'PATH': f'{cluster}:{os.environ["PATH"]}',
    'SLURM_SUBMIT_DIR': str(cluster),
    'SLURM_JOB_ID': '7',
    **variables,
  }
  return subprocess.Popen(
    ['bash', str(LAUNCH / 'slurm.sh'), '--config=a b.py'], env=environment
  )


@pytest.mark.parametrize(
  ('codes', 'restarts', 'requeued'),
  [
    ('0 0', 0, False),
    ('2 2', 0, False),
    ('1', 0, False),
    ('75', 0, True),
    ('0 134', 0, True),
    ('75 2', 0, False),  # lost because another one found a mistake
    ('143', 99, True),
    ('143', 100, False),
  ],
)
def test_a_job_that_lost_a_process_goes_back_to_the_queue(
  codes, restarts, requeued, cluster
):
  process = submit(cluster, CODES=codes, SLURM_RESTART_COUNT=str(restarts))
  assert process.wait(20) == max(map(int, codes.split()))
  calls = (cluster / 'calls').read_text().splitlines()
  assert calls[0].startswith('srun --')
  assert calls[1] == 'python launch/main.py --multihost --config=a b.py'
  assert ('scontrol requeue 7' in calls) == requeued
  assert not list(cluster.glob('.*'))


def test_a_job_whose_time_ends_stops_the_run_and_is_requeued(cluster):
  process = submit(cluster, CODES='wait')
  end = time.monotonic() + 20
  while not (cluster / 'pids').exists() or not (cluster / 'pids').read_text():
    assert time.monotonic() < end
    time.sleep(0.02)
  process.send_signal(signal.SIGUSR1)
  assert process.wait(20) == 143
  calls = (cluster / 'calls').read_text().splitlines()
  assert calls[2:] == ['scancel --signal=TERM 7', 'scontrol requeue 7']
