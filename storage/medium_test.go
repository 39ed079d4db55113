package storage

// onDisk is the medium of a Store on a directory.
func (s *Store) onDisk() *directory { return s.medium.(*directory) }

// path is the path on disk of a driver path.
func (s *Store) path(driverPath string) string { return s.onDisk().path(driverPath) }
