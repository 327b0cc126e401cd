// Builds dist/: the bundles, 'use client' in each that uses React, and the types.
import { execFileSync } from 'node:child_process';
import { readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { build } from 'vite';

process.chdir(join(import.meta.dirname, '..'));
await build({ logLevel: 'warn' });

for (const name of readdirSync('dist', { recursive: true })) {
  const path = join('dist', name);
  if (!path.endsWith('.js')) continue;
  const code = readFileSync(path, 'utf8');
  if (/\bfrom\s*["']react["'/]/.test(code)) writeFileSync(path, `'use client';\n${code}`);
}

execFileSync('node_modules/.bin/tsc', ['-p', 'tsconfig.build.json'], { stdio: 'inherit' });
