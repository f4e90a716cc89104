"""Faults in what is written to disk and read again: checkpoints, summaries, the folder of a run."""

from __future__ import annotations

from .mutant import faults

_STORE, _FOLDER, _FILES = "utils/train/checkpoint_store.py", "utils/train/run_folder.py", "utils/files.py"
_CHECKPOINT, _LOG, _RECOVERY = "utils/run/checkpoint.py", "utils/train/run_files.py", "utils/train/recovery.py"

MUTANTS = faults(
    "files",
    (
        _FOLDER,
        "os.path.realpath(Path(cfg.resume).parent) == os.path.realpath(folder)",
        "Path(cfg.resume).parent == folder",
        "--resume FOLDER/last.pth.tar sets the run aside that it continues",
        "test_run_folder.py::test_a_run_goes_on_in_the_folder_of_its_checkpoint",
    ),
    (
        _FOLDER,
        "        and not cfg.no_resume_opt\n",
        "",
        "a new run from old weights goes on in the folder of the old one",
        "test_run_folder.py::test_a_run_goes_on_in_the_folder_of_its_checkpoint "
        "test_run_folder.py::test_a_checkpoint_in_the_folder_of_a_new_run_is_refused",
    ),
    (
        "utils/run/folder.py",
        "fcntl.LOCK_EX | fcntl.LOCK_NB",
        "fcntl.LOCK_SH | fcntl.LOCK_NB",
        "two runs write to one folder",
        "test_run_folder.py::test_a_second_start_beside_a_live_run_is_refused_and_changes_nothing",
    ),
    (
        _FILES,
        "os.fsync(file.fileno())",
        "pass",
        "a checkpoint is renamed before its bytes are on the disk",
        "test_files.py::test_what_must_be_durable_is_on_the_disk_before_and_after_its_new_name",
    ),
    (
        _FILES,
        "_sync_folder(path.parent)",
        "pass",
        "the new name of a checkpoint may be lost",
        "test_files.py::test_what_must_be_durable_is_on_the_disk_before_and_after_its_new_name",
    ),
    (
        _FILES,
        "temporary.unlink(missing_ok=True)",
        "pass",
        "half-written files stay",
        "test_files.py::test_an_interruption_leaves_the_old_file_alone",
    ),
    (
        _STORE,
        "        write_checkpoint(self.folder / LAST,",
        "        (self.folder / RECOVERY).unlink(missing_ok=True)\n        write_checkpoint(self.folder / LAST,",
        "the recovery checkpoint is removed before the one that replaces it is written",
        "test_checkpoint.py::test_at_each_moment_a_checkpoint_of_the_present_epoch_can_be_read",
    ),
    (
        _STORE,
        "self._rank(metric) < self._rank(self.best[0])",
        "self._rank(metric) <= self._rank(self.best[0])",
        "of equally good epochs the last is the best",
        "test_checkpoint.py::test_history_keeps_the_best_epochs_and_best_and_last_name_theirs",
    ),
    (
        _STORE,
        "return metric if self.decreasing else -metric",
        "return -metric",
        "the largest loss is the best",
        "test_checkpoint.py::test_history_keeps_the_best_epochs_and_best_and_last_name_theirs",
    ),
    (
        _STORE,
        "if math.isnan(metric):",
        "if False:",
        "an epoch without a number stays the best",
        "test_checkpoint.py::test_history_keeps_the_best_epochs_and_best_and_last_name_theirs",
    ),
    (
        "utils/run/weights.py",
        "names = {key.removeprefix(_PREFIX)",
        'names = {key.replace(_PREFIX, "")',
        "a part called module loses its name",
        "test_checkpoint.py::test_a_prefix_inside_a_name_is_kept",
    ),
    (
        "utils/torch_file.py",
        "weights_only=True",
        "weights_only=False",
        "a checkpoint may run code",
        "test_checkpoint.py::test_a_file_that_would_run_code_is_refused_and_runs_none",
    ),
    (
        _LOG,
        "int(epoch_of(line)) < epoch",
        "int(epoch_of(line)) <= epoch",
        "a resumed epoch has two lines in the summary",
        "test_run_files.py::test_a_resumed_run_writes_each_epoch_once",
    ),
    (
        _LOG,
        'if known and line.endswith("\\n"):',
        "if known:",
        "half a line of a killed process stays",
        "test_run_files.py::test_a_resumed_run_writes_each_epoch_once",
    ),
    (
        _RECOVERY,
        "return epoch + 1, None",
        "return epoch, None",
        "the last epoch is trained again after a resume",
        "test_trainer.py::test_a_resumed_run_goes_on_with_schedule_scaler_and_history",
    ),
    (
        _RECOVERY,
        "due = mark > self._mark and mark[1] > 0",
        "due = mark > self._mark",
        "each epoch begins with a checkpoint nobody asked for",
        "test_run_files.py::test_recovery_checkpoints_come_at_multiples_of_the_interval",
    ),
)
