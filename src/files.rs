//! This crate's own files: written whole or not at all.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use crate::error::{Error, Result};

/// Writes a file so that no partial file ever appears at its path.
///
/// The bytes go to a temporary file beside it and to the disk first; then that file takes the place of the old one. If
/// anything fails, the disk being full for instance, the old file is untouched and the temporary one removed. Threads
/// and processes that write to one path do not disturb each other: the last one to finish wins. Whoever has the old
/// file open goes on reading it.
///
/// # Errors
///
/// [`Error::Io`] names the path. On Windows that includes a file that another program has mapped into memory, or opened
/// without sharing its deletion: it cannot be replaced before that program lets go of it.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = NewFile::create(path)?;
    file.write(bytes)?;
    file.commit()
}

/// A file that is written piece by piece, as atomically as by [`write_atomically`]. Dropped before
/// [`commit`](Self::commit), it leaves nothing behind.
#[derive(Debug)]
pub(crate) struct NewFile {
    path: PathBuf,
    // Closed before it is removed.
    file: BufWriter<File>,
    temporary: Temporary,
}

impl NewFile {
    /// Starts a file that will be at this path.
    pub fn create(path: &Path) -> Result<Self> {
        let (temporary, file) = Temporary::beside(path).map_err(Error::io(path))?;
        Ok(NewFile { path: path.into(), file: BufWriter::new(file), temporary })
    }

    /// Appends bytes.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(Error::io(&self.path))
    }

    /// Appends all of an open file, which has this path.
    pub fn write_all_of(&mut self, path: &Path, file: &mut File) -> Result<()> {
        io::copy(file, &mut self.file).map(drop).map_err(Error::io(path))
    }

    /// Waits until the disk has everything. Several files that belong together are all synced before the first is
    /// committed: a full disk then changes none of them.
    pub fn sync(&mut self) -> Result<()> {
        let sync = |file: &mut BufWriter<File>| file.flush().and_then(|()| file.get_ref().sync_all());
        sync(&mut self.file).map_err(Error::io(&self.path))
    }

    /// Puts the file in its place.
    pub fn commit(mut self) -> Result<()> {
        self.sync()?;
        let NewFile { path, file, mut temporary } = self;
        drop(file);
        replace(&temporary.path, &path).map_err(Error::io(&path))?;
        temporary.renamed = true;
        sync_folder(&path).map_err(Error::io(&path))
    }
}

/// The name of a file in the making. Removes the file unless it was renamed.
#[derive(Debug)]
struct Temporary {
    path: PathBuf,
    renamed: bool,
}

impl Temporary {
    /// A file of its own in the same folder as `path`.
    fn beside(path: &Path) -> io::Result<(Temporary, File)> {
        /// Counts the files of this process, whichever thread makes them.
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let stem =
            path.file_name().ok_or_else(|| io::Error::new(ErrorKind::InvalidInput, "is not the path of a file"))?;
        loop {
            let mut name = stem.to_os_string();
            name.push(format!(".{}.{}.tmp", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed)));
            let temporary = path.with_file_name(name);
            match OpenOptions::new().write(true).create_new(true).open(&temporary) {
                Ok(file) => return Ok((Temporary { path: temporary, renamed: false }, file)),
                // Left by a process that was killed, or in use by one of this id on another machine.
                Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
                Err(e) => return Err(e),
            }
        }
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.renamed {
            // The first error is the one to report. A leftover file does no harm.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Renames over what is at `to`. Scanners and indexers of Windows open new files for a moment, and a file that is open
/// like this cannot be replaced: they get a fifth of a second to finish.
fn replace(from: &Path, to: &Path) -> io::Result<()> {
    let mut tries = if cfg!(windows) { 10 } else { 1 };
    loop {
        tries -= 1;
        match fs::rename(from, to) {
            Err(e) if tries > 0 && e.kind() == ErrorKind::PermissionDenied => thread::sleep(Duration::from_millis(20)),
            other => return other,
        }
    }
}

/// Brings a rename to the disk: without it, a power failure could bring the old file back.
#[cfg(unix)]
fn sync_folder(path: &Path) -> io::Result<()> {
    let folder = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    match File::open(folder).and_then(|folder| folder.sync_all()) {
        // Folders that may not be listed, and file systems that do not sync folders. The file is in its place anyway.
        Err(e)
            if [ErrorKind::PermissionDenied, ErrorKind::InvalidInput, ErrorKind::Unsupported].contains(&e.kind()) =>
        {
            Ok(())
        }
        other => other,
    }
}

/// Other systems do not open folders as files; NTFS keeps a journal of renames.
#[cfg(not(unix))]
fn sync_folder(_: &Path) -> io::Result<()> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The names in a folder.
    fn names(dir: &Path) -> Vec<String> {
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn a_write_that_fails_leaves_no_trace() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("taken");
        // A folder that is not empty cannot be replaced by a file.
        fs::create_dir_all(target.join("inside")).unwrap();
        let err = write_atomically(&target, b"new").unwrap_err().to_string();
        assert!(err.contains("taken"), "{err}");
        assert_eq!(names(dir.path()), ["taken"], "a temporary file is left");
        assert!(target.join("inside").is_dir());
        let err = write_atomically(&dir.path().join("none").join("file"), b"new").unwrap_err().to_string();
        assert!(err.contains("none"), "{err}");
        assert!(write_atomically(Path::new("/"), b"new").is_err());
    }

    #[test]
    fn a_file_that_is_given_up_leaves_the_old_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        write_atomically(&path, b"old").unwrap();
        let mut file = NewFile::create(&path).unwrap();
        file.write(b"half of the n").unwrap();
        file.sync().unwrap();
        assert_eq!(names(dir.path()).len(), 2);
        drop(file);
        assert_eq!((names(dir.path()), fs::read(&path).unwrap()), (vec!["file".to_string()], b"old".to_vec()));
    }

    /// On Linux, `/dev/full` is a disk without room.
    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_is_an_error() {
        let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
        let temporary = Temporary { path: "/dev/no such file".into(), renamed: false };
        let mut file = NewFile { path: "model".into(), file: BufWriter::new(full), temporary };
        file.write(b"buffered").unwrap();
        let err = file.commit().unwrap_err().to_string();
        assert!(err.starts_with("model: "), "{err}");
    }

    #[test]
    fn threads_that_write_to_one_path_leave_the_file_of_one_of_them() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let whole = |i: u8| vec![i; 100_000];
        thread::scope(|scope| {
            for i in 0..4 {
                let path = &path;
                scope.spawn(move || (0..5).for_each(|_| write_atomically(path, &whole(i)).unwrap()));
            }
            // Who reads meanwhile sees one of them whole.
            for _ in 0..20 {
                let Ok(read) = fs::read(&path) else { continue };
                assert_eq!(read, whole(read[0]));
            }
        });
        assert_eq!(names(dir.path()), ["file"]);
    }

    #[test]
    fn who_reads_a_file_goes_on_reading_the_old_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        write_atomically(&path, b"old").unwrap();
        let old = File::open(&path).unwrap();
        write_atomically(&path, b"new").unwrap();
        assert_eq!(io::read_to_string(old).unwrap(), "old");
        assert_eq!(fs::read(&path).unwrap(), b"new");
    }
}
